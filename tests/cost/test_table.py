import json
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdlab.core.types import UsageError
from pdlab.cost import CostSpec, build, hardware, model
from pdlab.cost.table import DecodeGrid, PrefillGrid, Profile, Table, load_profile, save_profile, shipped_tables


def prefill_at(tokens, cached):
    return 0.005 + 1e-5 * tokens + 1e-9 * tokens * cached  # bilinear, so that interpolation is exact


def decode_at(batch, context):
    return 0.004 + 1e-5 * batch + 1e-8 * batch * context


TOKENS, CACHED, BATCH, CONTEXT = (1, 100, 1000, 8000), (0, 1000, 10000), (1, 8, 64, 256), (1, 100, 1000, 4000)
PROFILE = Profile(
    name="exact",
    prefill=PrefillGrid(tokens=TOKENS, cached=CACHED, seconds=tuple(tuple(prefill_at(t, c) for c in CACHED) for t in TOKENS)),
    decode=DecodeGrid(batch=BATCH, context=CONTEXT, seconds=tuple(tuple(decode_at(b, c) for c in CONTEXT) for b in BATCH)),
)
CURVED = Profile(
    name="curved",
    prefill=PROFILE.prefill,
    decode=DecodeGrid(batch=(1, 16), context=(1, 1000, 4000), seconds=((0.005, 0.006, 0.012), (0.006, 0.009, 0.030))),
)


@given(tokens=st.integers(1, 8000), cached=st.integers(0, 10000))
def test_prefill_interpolates_both_ways(tokens, cached):
    assert Table(PROFILE).prefill_s([(tokens, cached)]) == pytest.approx(prefill_at(tokens, cached))


@given(batch=st.integers(1, 256), each=st.integers(1, 4000))
def test_decode_interpolates_both_ways(batch, each):
    assert Table(PROFILE).decode_s(batch, batch * each) == pytest.approx(decode_at(batch, each))


@given(batch=st.integers(1, 16), each=st.floats(1, 4000), ahead=st.floats(0, 1))
def test_the_line_holds_until_it_says_so(batch, each, ahead):
    cost = Table(CURVED)
    start = max(batch, int(batch * each))
    base_s, slope, until = cost.decode_line(batch, start)
    there = int(start + ahead * (min(until, 4000.0 * batch) - start))
    if start <= there < until:
        assert cost.decode_s(batch, there) == pytest.approx(base_s + slope * there)


def test_lines_join_at_grid_points():
    cost = Table(CURVED)
    base_s, slope, until = cost.decode_line(4, 10)
    assert until == 4000
    assert base_s + slope * until == pytest.approx(cost.decode_s(4, 4000))
    assert cost.decode_line(4, 4000)[2] == 16001  # the last context on the grid is still on it


def test_several_chunks_pay_the_fixed_part_once():
    assert Table(PROFILE).prefill_s([(100, 0), (1000, 0)]) == pytest.approx(0.005 + 1e-5 * 1100)


def test_a_mixed_step_adds_what_decoding_costs_beyond_the_cheapest():
    cost = Table(PROFILE)
    added = decode_at(8, 100) - decode_at(1, 1)
    assert cost.mixed_s([(1000, 0)], 8, 800) == pytest.approx(prefill_at(1000, 0) + added)


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda t: t.prefill_s([(8001, 0)]), "exact: prefill of 8001 tokens after 0 lies outside the grid"),
        (lambda t: t.prefill_s([(100, 10001)]), "prefill of 100 tokens after 10001"),
        (lambda t: t.decode_s(257, 257), "decode of batch 257 lies outside"),
        (lambda t: t.decode_s(8, 32001), r"decode of batch 8 with context 32001 lies outside the grid \(context 8..32000 there\)"),
        (lambda t: t.decode_s(8, 7), "decode of batch 8 with context 7"),
        (lambda t: t.mixed_s([(8001, 0)], 8, 800), "prefill of 8001"),
    ],
)
def test_outside_the_grid_it_refuses_unless_told_to_extrapolate(ask, said):
    with pytest.raises(UsageError, match=said):
        ask(Table(PROFILE))
    continued = Table(PROFILE, extrapolate=True)
    assert ask(continued) > 0.0
    assert continued.extrapolated == 1


def test_extrapolation_is_linear_and_never_ends():
    cost = Table(PROFILE, extrapolate=True)
    assert cost.prefill_s([(20000, 0)]) == pytest.approx(prefill_at(20000, 0))
    assert cost.decode_s(300, 300 * 8000) == pytest.approx(decode_at(300, 8000))
    assert cost.decode_line(8, 8 * 5000)[2] == inf


def test_inside_the_grid_nothing_is_counted():
    cost = Table(PROFILE, extrapolate=True)
    cost.decode_s(8, 800)
    cost.prefill_s([(100, 0)])
    assert cost.extrapolated == 0


def test_a_single_row_or_column_is_a_grid_too():
    flat = Profile(
        prefill=PrefillGrid(tokens=(64,), cached=(0,), seconds=((0.01,),)),
        decode=DecodeGrid(batch=(4,), context=(128,), seconds=((0.02,),)),
    )
    cost = Table(flat)
    assert cost.prefill_s([(64, 0)]) == 0.01
    assert cost.decode_s(4, 512) == 0.02


def test_a_profile_survives_its_file(tmp_path):
    save_profile(PROFILE, tmp_path / "p.json")
    assert load_profile(tmp_path / "p.json") == PROFILE


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokens": [100, 1, 1000, 8000]}, "prefill: axis 'tokens' must ascend strictly"),
        ({"seconds": [[1.0]]}, "prefill: seconds must be 4 rows"),
        ({"second": []}, "prefill.second: Extra inputs"),
        ({"seconds": [[0.0] * 3] * 4}, "every time must be positive"),
    ],
)
def test_a_malformed_profile_names_its_place(tmp_path, change, said):
    raw = json.loads(PROFILE.model_dump_json())
    raw["prefill"] |= change
    (tmp_path / "p.json").write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(UsageError, match=said):
        load_profile(tmp_path / "p.json")


def test_a_missing_profile_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match=r"cost table .*nope.json: No such file"):
        load_profile(tmp_path / "nope.json")


@pytest.mark.parametrize("name", shipped_tables())
def test_a_shipped_table_is_of_the_model_and_accelerators_that_its_name_says(name):
    of, _, tp = name.rpartition("-tp")
    chip = next(one for one in ("h100-sxm", "h200-sxm", "b200-sxm") if of.endswith(f"-{one}"))
    served = model(of.removesuffix(f"-{chip}"))
    table = build(CostSpec(table=name), served, hardware(chip), int(tp))
    roofline = build(CostSpec(), served, hardware(chip), int(tp))
    for batch in (1, 8, 64):
        assert 0.5 < table.decode_s(batch, 1500 * batch) / roofline.decode_s(batch, 1500 * batch) < 1.6
    assert 0.3 < table.prefill_s([(4096, 0)]) / roofline.prefill_s([(4096, 0)]) < 1.7


def test_twelve_tables_ship_with_their_licence():
    found = shipped_tables()
    folder = next(iter(found.values())).parent
    assert len(found) == 12
    assert "Apache License" in (folder / "NOTICE").read_text()
    assert all("Apache-2.0" in load_profile(path).source for path in found.values())


def test_a_name_that_no_table_has_is_told_the_nearest():
    with pytest.raises(UsageError, match=r"neither a file nor one of .*; nearest is llama-3.1-8b-h100-sxm-tp1"):
        build(CostSpec(table="llama-3.1-8b-h100-sxm-tp2"), model("llama-3.1-8b"), hardware("h100-sxm"), 2)
