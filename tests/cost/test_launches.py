"""What is known of a measured server's launch, beside its row."""

from dataclasses import asdict, replace

import pytest

from pdlab.cost.launches import Delay, decode_slots, delay, front_share, waves
from pdlab.cost.loops import Rates, closed_loops, loops
from pdlab.cost.measurements import MeasuredRow, Side
from pdlab.cost.parallel import Parallel
from pdlab.cost.roofline import coefficients
from pdlab.search.board.run import experiment_of

ROW = MeasuredRow(
    id="r",
    model_name="deepseek-r1",
    hardware_name="b200-sxm",
    engine="sglang",
    version="0.5.9",
    weight_dtype="nvfp4",
    kv_dtype="fp8",
    mtp_tokens=0,
    sides=(Side("mixed", 1, Parallel(tp=8, ep=8)),),
    concurrency=32,
    prompt_tokens=1024,
    output_tokens=1024,
    ttft_s=0.4,
    tpot_s=0.02,
)
LLAMA = replace(ROW, model_name="llama-3.1-70b", engine="trtllm", weight_dtype="fp8", sides=(Side("mixed", 1, Parallel(tp=2)),))
GROUPS = replace(ROW, engine="trtllm", sides=(Side("mixed", 1, Parallel(tp=8, dp_attention=8, ep=8)),))


def apart(hardware, dp_attention=1):
    """SGLang with prefill and decode apart."""
    return replace(
        ROW,
        hardware_name=hardware,
        sides=(Side("prefill", 1, Parallel(tp=8)), Side("decode", 1, Parallel(tp=8, dp_attention=dp_attention))),
    )


@pytest.mark.parametrize(
    ("row", "held"),
    [
        (ROW, Delay(30, polled=True)),
        (replace(ROW, concurrency=8), Delay(10, polled=True)),
        (replace(ROW, hardware_name="h200-sxm", weight_dtype="fp8"), None),
        (replace(ROW, model_name="glm-5"), None),
        (replace(ROW, prompt_tokens=2000), None),
        (replace(ROW, engine="vllm"), None),
        (LLAMA, Delay(20, 1843 - 32)),
        (replace(LLAMA, output_tokens=8192), None),
        (replace(LLAMA, sides=(Side("mixed", 1, Parallel(tp=8)),)), None),
        (replace(ROW, engine="trtllm", weight_dtype="fp8", concurrency=64), Delay(40, 6490)),
        (replace(ROW, engine="trtllm", weight_dtype="fp8"), None),
        (GROUPS, Delay(60, 20038, polled=True)),
        (replace(GROUPS, mtp_tokens=1), Delay(99, 20038, polled=True)),
        (apart("gb200-nvl72", 8), Delay(50, polled=True)),
        (apart("gb200-nvl72"), Delay(10, polled=True)),
        (apart("b200-sxm", 8), Delay(30, polled=True)),
        (replace(apart("gb200-nvl72", 8), engine="trtllm"), None),
        (replace(apart("h200-sxm"), weight_dtype="fp8"), None),
        (replace(apart("b200-sxm"), prompt_tokens=2000), None),
    ],
)
def test_who_holds_prompts_back_and_how_long(row, held):
    assert delay(row) == held


def test_in_the_mean_a_prompt_waits_half_of_what_is_polled_and_less_where_others_wait_with_it():
    assert Delay(30, polled=True).waited_steps(0.1, 900.0) == 15.0
    assert Delay(20).waited_steps(1e-9, 900.0) == pytest.approx(20.0)
    assert Delay(20).waited_steps(0.1, 900.0) == pytest.approx((20 + 2 * 10) / 3)
    assert Delay(60, 1800, polled=True).waited_steps(0.1, 900.0) == 10.0  # two prompts come in 20 steps


def test_it_is_simulated_so():
    engine = experiment_of(ROW).engine
    assert engine.batching == "delayed(polled=True, prompts_first=True, steps=30, tokens=0)"
    assert experiment_of(replace(ROW, prompt_tokens=2000)).engine.batching == "prefill_first"
    assert experiment_of(LLAMA).engine.batching.startswith("delayed(polled=False, prompts_first=False, steps=20")
    prefill, decode = (instance.engine for instance in experiment_of(apart("b200-sxm")).cluster.instances)
    assert experiment_of(apart("b200-sxm")).engine.batching == "prefill_first" and prefill is None
    assert decode.batching == "delayed(polled=True, steps=30, tokens=0)"


def test_a_wave_alone_where_sglang_was_measured_elsewhere():
    elsewhere = replace(ROW, prompt_tokens=2000)
    assert (waves(ROW), waves(elsewhere), waves(replace(elsewhere, engine="vllm"))) == (10, 1, 10)
    assert experiment_of(elsewhere).workload.requests == 32


def test_the_front_end_is_quicker_with_workers_of_its_own_and_slower_behind_a_proxy_and_in_a_version():
    apart = (Side("prefill", 1, Parallel(tp=8)), Side("decode", 1, Parallel(tp=8)))
    rows = LLAMA, replace(LLAMA, sides=apart), GROUPS, ROW, replace(GROUPS, version="1.1.0rc2.post2")
    shares = [front_share(row) for row in rows]
    assert shares[0] < shares[2] == shares[3] == 1.0 < min(shares[1], shares[4])
    factors = experiment_of(LLAMA).cost.factors
    assert factors is not None and factors.front == shares[0]


def test_a_table_can_say_that_a_server_was_launched_as_its_engine_is_by_default():
    for row in (ROW, LLAMA, GROUPS, replace(ROW, prompt_tokens=2000)):
        own = replace(row, as_default=True)
        assert (delay(own), waves(own), front_share(own)) == (None, 10, 1.0)


RECIPE = replace(
    ROW,
    hardware_name="gb200-nvl72",
    engine="trtllm",
    version="0.8.1.post2",
    weight_dtype="fp8",
    sides=(Side("prefill", 1, Parallel(tp=8, dp_attention=8, ep=8)), Side("decode", 3, Parallel(tp=8, ep=8))),
    concurrency=27,
)


@pytest.mark.parametrize(
    ("row", "slots"),
    [
        (RECIPE, 8),
        (replace(RECIPE, concurrency=3), 1),
        (replace(RECIPE, concurrency=28), None),
        (replace(RECIPE, engine="sglang"), None),
        (replace(RECIPE, as_default=True), None),
        (replace(RECIPE, prompt_tokens=2000), None),
        (replace(RECIPE, sides=(RECIPE.sides[0], replace(RECIPE.sides[1], workers=4))), None),
        (ROW, None),
    ],
)
def test_a_recipe_says_how_many_requests_decode_at_once(row, slots):
    assert decode_slots(row) == slots


def test_requests_without_a_slot_wait_for_one_to_end():
    decode = experiment_of(RECIPE).placements()[-1].engine
    assert (decode.max_seqs, decode.batching) == (8, "chunked")
    few, many = (loops([row]) for row in (RECIPE, replace(RECIPE, concurrency=24, as_default=True)))
    assert (few.room, many.room > 1e3) == (24.0, True)
    rates = Rates(asdict(coefficients("blackwell-trtllm")) | {"acceptance": 1.0})
    (tpot_s,), (waited_s,) = closed_loops(few, rates)
    (_, (at_once_s,)) = closed_loops(many, rates)
    turn_s = (few.output[0] - 1) * tpot_s / 24  # of the three that wait
    assert waited_s - at_once_s == pytest.approx(3 * turn_s, rel=0.25)
