"""Profiles of measured instances: read, refused, and turned into seconds."""

import json
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdlab import cost
from pdlab.core.types import UsageError
from pdlab.cost.measured import MeasuredCost
from pdlab.cost.profile import (
    SCHEMA,
    AddedGrid,
    EngineShape,
    InstanceProfile,
    Machine,
    ModelShape,
    Overheads,
    StepTimes,
    TransferFit,
    load_instance_profile,
    save_instance_profile,
)
from pdlab.cost.table import DecodeGrid, PrefillGrid

SMOL = cost.model("smollm2-135m")
FIXED, TOKEN, PAIR, PROMPT, SEQ = 4e-3, 1e-4, 1e-8, 5e-4, 1e-3  # a step, a token, a token attending to a token, a prompt, a decode


def prefill_at(n, c):
    return FIXED + TOKEN * n + PAIR * n * (c + n / 2)


def decode_at(b, c):
    return FIXED + SEQ * b + PAIR * b * c


TOKENS, CACHED, BATCH, CONTEXT = tuple(range(1, 400)), (0, 500, 1000), (1, 8, 32), (1, 500, 2000)
STEPS = StepTimes(
    prefill=PrefillGrid(tokens=TOKENS, cached=CACHED, seconds=tuple(tuple(prefill_at(n, c) for c in CACHED) for n in TOKENS)),
    decode=DecodeGrid(batch=BATCH, context=CONTEXT, seconds=tuple(tuple(decode_at(b, c) for c in CONTEXT) for b in BATCH)),
    added=AddedGrid(tokens=(1, 256), batch=(1, 32), seconds=((SEQ, 32 * SEQ), (SEQ, 32 * SEQ))),
    prompt_s=PROMPT,
)
PROFILE = InstanceProfile(
    name="smol on a machine",
    machine=Machine(cpu="a CPU", cores=2, memory_bytes=8 << 30, threads=1),
    model=ModelShape(
        name="SmolLM2", layers=30, hidden=576, heads=9, kv_heads=3, head_dim=64, vocab=49152, dtype="float32", kv_bytes_per_token=46080
    ),
    engine=EngineShape(block_tokens=16, kv_blocks=100, max_batch_tokens=2048, max_seqs=32, max_tokens=2048),
    steps=STEPS,
    overheads=Overheads(request_s=0.002, handoff_s=0.001),
    transfer=TransferFit(transport="shm", bytes_per_s=2e9),
)


@pytest.fixture
def path(tmp_path):
    found = tmp_path / "profile.json"
    save_instance_profile(PROFILE, found)
    return found


def test_a_profile_reads_as_it_was_written(path):
    assert load_instance_profile(path) == PROFILE
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_profile(path, monkeypatch):
    monkeypatch.setattr(InstanceProfile, "model_dump_json", lambda self, indent: "\udc80")  # cannot be written
    with pytest.raises(UnicodeEncodeError):
        save_instance_profile(PROFILE, path)
    assert list(path.parent.iterdir()) == [path]
    assert load_instance_profile(path) == PROFILE


@settings(deadline=None, max_examples=50)
@given(chunks=st.lists(st.tuples(st.integers(8, 80), st.integers(0, 1000)), min_size=1, max_size=4))
def test_several_prompts_share_a_step_but_not_their_attention(chunks):
    exact = FIXED + sum(TOKEN * n + PAIR * n * (c + n / 2) for n, c in chunks) + PROMPT * (len(chunks) - 1)
    assert MeasuredCost(STEPS).prefill_s(chunks) == pytest.approx(exact, rel=1e-3)


@settings(deadline=None, max_examples=50)
@given(n=st.integers(1, 300), b=st.integers(1, 32), c=st.integers(1, 2000))
def test_decodes_add_to_a_prompt_what_was_measured(n, b, c):
    exact = prefill_at(n, 0) + SEQ * b + PAIR * b * (c - 1)
    assert MeasuredCost(STEPS).mixed_s([(n, 0)], b, b * c) == pytest.approx(exact, rel=1e-3)


def test_telling_a_token_costs_each_sequence_that_gets_one():
    plain, told = MeasuredCost(STEPS), MeasuredCost(STEPS, Overheads(token_s=0.25))
    assert told.decode_s(3, 300) == pytest.approx(plain.decode_s(3, 300) + 0.75)
    assert told.prefill_s([(5, 0), (6, 0)]) == pytest.approx(plain.prefill_s([(5, 0), (6, 0)]) + 0.5)
    assert told.mixed_s([(5, 0)], 3, 300) == pytest.approx(plain.mixed_s([(5, 0)], 3, 300) + 1.0)


def test_the_grids_go_on_beyond_their_ends_and_count_it():
    made = MeasuredCost(STEPS)
    assert made.decode_s(64, 64 * 100) == pytest.approx(decode_at(64, 100))
    assert made.decode_line(8, 8 * 3000)[2] == inf
    assert made.extrapolated == 2


def test_a_profile_is_a_hardware_with_its_own_memory_and_links(path):
    chip = cost.hardware("profile.json", path.parent)
    assert cost.kv_capacity_tokens(SMOL, chip) == 1600
    assert cost.kv_bytes_per_token(SMOL, chip) == 46080
    assert chip.nic_bytes_per_s == chip.pcie_bytes_per_s == 2e9
    assert isinstance(cost.build(cost.CostSpec(), SMOL, chip), MeasuredCost)


@pytest.mark.parametrize("use", [cost.kv_capacity_tokens, lambda model, chip: cost.build(cost.CostSpec(), model, chip)])
def test_a_foreign_models_profile_is_refused(path, use):
    with pytest.raises(UsageError, match=r"was measured with SmolLM2, not opt-13b \(it has 30 layers, opt-13b 40\)"):
        use(cost.model("opt-13b"), cost.hardware(str(path)))


def test_a_profile_has_no_roofline_and_no_ranks(path):
    chip = cost.hardware(str(path))
    with pytest.raises(UsageError, match=r"remove cost\.roofline"):
        cost.build(cost.CostSpec(roofline="h100"), SMOL, chip)
    with pytest.raises(UsageError, match="write tp: 1, not 3"):
        cost.build(cost.CostSpec(), SMOL, chip, 3)


def test_unknown_kv_memory_asks_for_blocks():
    unknown = PROFILE.model_copy(update={"engine": PROFILE.engine.model_copy(update={"kv_blocks": 0})})
    with pytest.raises(UsageError, match=r"give engine\.kv_blocks"):
        unknown.kv_tokens()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schema_version": SCHEMA + 1}, "schema_version: this pdlab reads version 1, not 2"),
        ({"steps": None}, "steps: "),
        ({"unsteady": {"share": 0.3}}, "unsteady.share: not known to this pdlab: measure again with pdlab calibrate"),
    ],
)
def test_an_unreadable_profile_says_in_one_line_where(path, change, says):
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UsageError) as error:
        cost.hardware(str(path))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_profile_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"gone\.json: No such file"):
        cost.hardware("gone.json", tmp_path)
