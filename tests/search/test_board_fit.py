"""The fit to measured servers: its fast arithmetic is the roofline's, and it finds the coefficients that made the rows."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest

from pdlab.cost import Drafts
from pdlab.cost.loops import Rates, closed_loops, loops
from pdlab.cost.measurements import MeasuredRow, Side
from pdlab.cost.parallel import Parallel
from pdlab.cost.roofline import Coefficients, Roofline, coefficients
from pdlab.search.board.fit import (
    PRIORS,
    coefficient_sets,
    left_out,
    main,
    minimise,
    of_engines,
    problem,
    report,
    strange,
    with_ratios,
    write,
)
from pdlab.search.board.run import ScoredRow

MIXED = (Side("mixed", 1, Parallel(tp=8)),)


def row(**changes) -> MeasuredRow:
    made = MeasuredRow(
        id="r",
        model_name="llama-3.1-70b",
        hardware_name="h100-sxm",
        engine="vllm",
        version="",
        weight_dtype="fp8",
        kv_dtype="fp8",
        mtp_tokens=0,
        sides=MIXED,
        concurrency=1,
        prompt_tokens=1000,
        output_tokens=1000,
        ttft_s=0.05,
        tpot_s=0.01,
    )
    return replace(made, **changes)


def rates(k: Coefficients, count: int) -> Rates:
    values = {**asdict(k), "acceptance": 0.65}
    return Rates({name: np.full(count, float(values[name])) for name in PRIORS})


SERVERS = [
    row(),
    row(model_name="gpt-oss-120b", weight_dtype=None),
    row(model_name="deepseek-v3", sides=(Side("mixed", 1, Parallel(tp=16, ep=16)),)),
    row(model_name="deepseek-v3", sides=(Side("mixed", 1, Parallel(tp=16, dp_attention=16, ep=16)),)),
    row(model_name="deepseek-v3", sides=(Side("mixed", 1, Parallel(tp=16)),), mtp_tokens=3),
]


@pytest.mark.parametrize("server", SERVERS, ids=["dense", "windows", "experts", "groups", "drafts"])
def test_alone_a_requests_tpot_is_the_rooflines_decode_step(server):
    k = coefficients("h100-vllm")
    (tpot_s,), (ttft_s,) = closed_loops(loops([server]), rates(k, 1))
    drafts = Drafts(server.mtp_tokens, 0.65)
    cost = Roofline(server.model(), server.hardware(), server.sides[0].parallel, k, server.weight_dtype, server.kv_dtype, drafts)
    assert tpot_s == pytest.approx(cost.decode_s(1, 900 + 450), rel=1e-9)
    assert ttft_s == pytest.approx(
        k.request_s + 0.5 * tpot_s + tpot_s + cost.mixed_s([(900, 0)], 1, 1350) - cost.decode_s(1, 1350), rel=1e-6
    )


def made_by(k: Coefficients) -> list[MeasuredRow]:
    rows = [
        row(id=f"{tp}-{c}-{n}", sides=(Side("mixed", 1, Parallel(tp=tp)),), concurrency=c, prompt_tokens=n)
        for tp in (2, 4, 8)
        for c in (1, 8, 64)
        for n in (500, 4000)
    ]
    tpot_s, ttft_s = closed_loops(loops(rows), rates(k, len(rows)))
    return [replace(one, tpot_s=float(t), ttft_s=float(f)) for one, t, f in zip(rows, tpot_s, ttft_s, strict=True)]


def test_a_fit_finds_what_made_the_rows():
    start = Coefficients(**{name: prior.value for name, prior in PRIORS.items() if name != "acceptance"})
    truth = replace(start, memory=0.9, layer_s=4e-5, request_s=0.06)
    of = problem(made_by(truth))
    at = minimise(of)
    tpot, ttft = of.misses(of.logs(at.x))
    assert np.abs(tpot).max() < 0.03
    assert np.abs(ttft).max() < 0.1
    made = coefficient_sets(of, at)["h100-vllm"]
    assert made.request_s == pytest.approx(0.06, rel=0.2)
    assert made.layer_s > start.layer_s
    assert made.rows == len(of.rows)
    alone, _ = left_out(of, at)
    assert np.abs(alone).max() >= np.abs(tpot).max()
    assert any("<= 64, dense" in line for line in report(of, at))


def test_rows_count_as_the_simulator_has_them():
    rows = made_by(coefficients("h100-vllm"))[:2]
    of = with_ratios(problem(rows), [ScoredRow(rows[0], ttft_s=rows[0].ttft_s * 2, tpot_s=rows[0].tpot_s * 1.1)])
    assert of.tpot_ratio[0] == pytest.approx(1.1, rel=1e-6)
    assert of.ttft_ratio[0] == pytest.approx(2.0, rel=1e-6)
    assert list(of.tpot_weight) == [1.0, 0.0]  # the other was not simulated


def test_what_is_fitted_replaces_what_ships_and_nothing_else(tmp_path):
    path = tmp_path / "coefficients.json"
    path.write_text(json.dumps({name: asdict(coefficients(name)) for name in ("h100-2023", "h100-vllm")}))
    of = problem(made_by(coefficients("h100-vllm"))[:6])
    write(coefficient_sets(of, minimise(of, rounds=3)), path)
    kept = json.loads(path.read_text())
    assert Coefficients(**kept["h100-2023"]) == coefficients("h100-2023")
    assert Coefficients(**kept["h100-vllm"]).rows == 6
    assert not Coefficients(**kept["ada-sglang"]).calibrated


def test_some_engines_sets_can_be_replaced_alone():
    sets = {name: coefficients(name) for name in ("h100", "h100-vllm", "h100-sglang", "ada-sglang")}
    assert list(of_engines(sets, ["sglang"])) == ["h100-sglang", "ada-sglang"]
    assert of_engines(sets, None) == sets


def test_an_error_counts_bands_of_rows_alike():
    crowd = [row(id=str(k), concurrency=4 + k % 8) for k in range(95)]
    full = [row(id=f"full {k}", concurrency=128) for k in range(5)]
    of = problem([*crowd, *full])
    of = replace(of, tpot_ratio=np.array([1.0] * 95 + [2.0] * 5))
    made = coefficient_sets(of, minimise(of, rounds=0))["h100-vllm"]
    misses, _ = left_out(of, minimise(of, rounds=0))
    assert made.error == pytest.approx(np.abs(misses[95:]).max(), rel=0.01)  # five rows of a hundred, and half of what counts


def test_a_table_that_is_missing_is_said(capsys):
    with pytest.raises(SystemExit):
        main(["none.csv"])
    assert "No such file" in capsys.readouterr().err


def test_rows_that_contradict_themselves_are_in_no_fit():
    odd = row(hardware_name="gb200-nvl72", engine="trtllm")
    assert "several" in strange(odd)
    assert problem([row(), odd]).tpot_weight.tolist() == [1.0, 0.0]
    assert strange(row()) == ""
