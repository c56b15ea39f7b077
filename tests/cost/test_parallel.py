"""How ranks share a model, and what follows for bytes, capacity and steps."""

from dataclasses import replace

import pytest

from pdlab.core.types import UsageError
from pdlab.cost import CostSpec, Drafts, build, hardware, kv_bytes_per_token, kv_capacity_tokens, model
from pdlab.cost.amounts import amounts, busiest_deviations
from pdlab.cost.error import cost_error
from pdlab.cost.parallel import Parallel, fitting
from pdlab.cost.roofline import Coefficients, Roofline, coefficients

H200, GB200, LLAMA, DEEPSEEK = hardware("h200"), hardware("gb200"), model("llama-3.1-70b"), model("deepseek-v3")
WIDE, GROUPS = Parallel(tp=8), Parallel(tp=8, dp_attention=8, ep=8)


@pytest.mark.parametrize("key", ["dp_attention", "ep"])
def test_groups_divide_tp(key):
    with pytest.raises(UsageError, match=f"{key} 3 does not divide tp 8: choose one of 1, 2, 4, 8"):
        Parallel(tp=8, **{key: 3})


def test_each_stage_has_a_layer():
    assert fitting(LLAMA, Parallel(pp=80)).pp == 80
    with pytest.raises(UsageError, match=r"pp 81 is more than the 80 layers of llama-3\.1-70b: each stage needs one"):
        fitting(LLAMA, Parallel(pp=81))


def test_mla_takes_any_tp_with_attention_whole_on_each_rank():
    assert fitting(DEEPSEEK, 36) == Parallel(tp=36, dp_attention=36)
    assert fitting(DEEPSEEK, 8) == Parallel(tp=8)
    with pytest.raises(UsageError, match="tp 12 does not divide the 64 attention heads"):
        fitting(LLAMA, 12)


def test_data_parallel_attention_does_not_copy_mlas_vector():
    assert kv_bytes_per_token(DEEPSEEK, H200, "fp8", WIDE) == 8 * kv_bytes_per_token(DEEPSEEK, H200, "fp8", GROUPS)
    wide, groups = (kv_capacity_tokens(DEEPSEEK, H200, p, weight_dtype="fp8", kv_dtype="fp8") for p in (WIDE, GROUPS))
    assert 5 * wide < groups < 8 * wide  # but each rank has all of attention's weights


def test_groups_of_ranks_share_the_context_of_a_batch():
    wide, groups = (Roofline(DEEPSEEK, H200, p, weight_dtype="fp8", kv_dtype="fp8") for p in (WIDE, GROUPS))
    assert groups.decode_line(64, 1)[1] < wide.decode_line(64, 1)[1]


def test_a_lone_prompt_keeps_one_group_busy():
    groups = Roofline(LLAMA, H200, Parallel(tp=8, dp_attention=8), weight_dtype="fp8")
    one, eight = groups.prefill_s([(2048, 0)]), groups.prefill_s([(2048, 0)] * 8)
    assert eight < 5 * one


def test_the_busiest_group_of_experts_sets_the_pace():
    even = Roofline(DEEPSEEK, H200, WIDE, weight_dtype="fp8")
    uneven = Roofline(DEEPSEEK, H200, Parallel(tp=8, ep=8), weight_dtype="fp8")
    assert uneven.decode_s(16, 16_000) > even.decode_s(16, 16_000)
    assert [round(busiest_deviations(n), 3) for n in (1, 2, 8)] == [0.0, 0.564, 1.424]


def test_stages_share_layers_and_overlap_prompts():
    one, two = Parallel(tp=8), Parallel(tp=8, pp=2)
    assert kv_capacity_tokens(LLAMA, H200, two) > 1.9 * kv_capacity_tokens(LLAMA, H200, one)
    whole, halves = (Roofline(LLAMA, H200, p) for p in (one, two))
    prompt = [(8192, 0)]
    assert halves.prefill_s(prompt) == pytest.approx(0.75 * whole.prefill_s(prompt), rel=0.01)
    assert halves.decode_s(64, 64_000) == pytest.approx(whole.decode_s(32, 32_000), rel=0.01)


def test_drafts_make_more_tokens_a_step():
    plain, three = Roofline(DEEPSEEK, H200, WIDE), Roofline(DEEPSEEK, H200, WIDE, drafts=Drafts(3, 0.8))
    assert Drafts(3, 0.5).made == 1.875
    assert three.decode_s(1, 1000) < 0.6 * plain.decode_s(1, 1000)
    never = Roofline(DEEPSEEK, H200, WIDE, drafts=Drafts(3, 0.0))
    assert never.decode_s(1, 1000) > plain.decode_s(1, 1000)
    with pytest.raises(UsageError, match="no draft layer"):
        build(CostSpec(fitted="distserve-opt-13b-a100"), model("opt-13b"), hardware("a100"), drafts=Drafts(1, 0.5))


def test_a_model_that_drafts_takes_steps_and_memory_of_its_own():
    served, drafter = model("qwen3-32b"), model("qwen3-0.6b")
    free, taken = (Roofline(served, H200, 2, drafts=Drafts(3, 0.8, layered=False, model=one)) for one in (None, drafter))
    k = replace(coefficients("h100"), step_s=0.0, sequence_s=0.0)
    alone = Roofline(drafter, H200, 1, k)
    for batch, context in ((1, 1000), (16, 30_000)):
        more_s = taken.decode_s(batch, context) - free.decode_s(batch, context)
        assert more_s == pytest.approx(3 * alone.decode_s(batch, context) / Drafts(3, 0.8).made)
        prompt = [(500, 100)]
        assert taken.mixed_s(prompt, batch, context) - free.mixed_s(prompt, batch, context) == pytest.approx(more_s)
    assert taken.prefill_s(prompt) == free.prefill_s(prompt), "a prompt is drafted from where its sequence decodes first"
    assert taken.joins
    assert taken.join_s(prompt) == alone.prefill_s(prompt)
    assert not free.joins
    assert free.join_s(prompt) == 0.0
    wide, narrow = (kv_capacity_tokens(served, H200, 2, drafts=one) for one in (None, drafter))
    each, own = served.kv_bytes_per_token_per_rank("bf16", 2), drafter.kv_bytes_per_token("bf16", 1)
    assert narrow == pytest.approx((wide * each - drafter.weights_bytes("bf16")) / (each + own), rel=1e-4)
    with pytest.raises(UsageError, match=r"qwen3-32b .* GB missing .* 16.4 GB of qwen3-8b that drafts"):
        kv_capacity_tokens(served, hardware("a100-sxm-80gb"), drafts=model("qwen3-8b"))


def test_blackwell_multiplies_in_four_bits_where_hopper_widens():
    b200, widened = hardware("b200"), amounts(LLAMA, H200, Parallel(), "nvfp4").feed_forward.token_s
    assert amounts(LLAMA, b200, Parallel(), "nvfp4").feed_forward.token_s[2] > 0
    assert widened[3] > 0
    assert widened[:3] == (0, 0, 0)


def test_a_cost_says_its_error():
    known = cost_error(CostSpec(), H200, "trtllm")
    assert known is not None
    assert (known.tpot, known.rows) == (coefficients("h100-trtllm").error, coefficients("h100-trtllm").rows)
    assert known.rows > 100
    low, high = known.interval(0.02)
    assert low < 0.02 < high
    guess = cost_error(CostSpec(), hardware("mi300x"))
    assert guess is not None
    assert not guess.measured
    assert guess.tpot > known.tpot
    assert "nothing like it was measured" in str(guess)
    given = Coefficients(compute=1, compute_8bit=1, memory=1, attention_memory=1, attention_compute=1, collective=1)
    assert cost_error(CostSpec(roofline=given), H200) is None
