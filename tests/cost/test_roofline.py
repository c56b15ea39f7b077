from dataclasses import replace
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdlab.core.types import UsageError
from pdlab.cost.catalogue import hardware, hardware_names, model
from pdlab.cost.roofline import Coefficients, Roofline, coefficient_sets, coefficients

IDEAL = Coefficients(
    compute=1.0,
    compute_8bit=1.0,
    memory=1.0,
    attention_memory=1.0,
    attention_compute=1.0,
    collective=1.0,
    collective_latency=0.0,
    compute_4bit=1.0,
    compute_widened=1.0,
    experts=1.0,
    experts_memory=1.0,
    activations=0.0,
)
LLAMA, H100 = model("llama-3.1-8b"), hardware("h100")
COSTS = [
    Roofline(LLAMA, H100),
    Roofline(model("deepseek-v3"), hardware("h200"), 8, weight_dtype="fp8"),
    Roofline(model("gpt-oss-20b"), H100, 2, weight_dtype="mxfp4"),
    Roofline(model("mistral-7b-v0.1"), hardware("ascend-910c")),
]
LABELS = ["dense", "mla+moe", "half windowed", "all windowed"]
chunks = st.lists(st.tuples(st.integers(1, 8192), st.integers(0, 50_000)), min_size=1, max_size=4)


def test_a_lone_decode_step_reads_the_weights_once():
    ideal = Roofline(LLAMA, H100, 1, IDEAL)
    read_s = 2 * (LLAMA.total_params - LLAMA.head_params) / H100.hbm_bytes_per_s
    assert ideal.decode_s(1, 0) == pytest.approx(read_s, rel=1e-3)


def test_a_long_prompt_is_bound_by_operations():
    ideal = Roofline(LLAMA, H100, 1, IDEAL)
    tokens = 8192
    linear = 2 * LLAMA.dense_params * tokens
    attention = 2 * 2 * LLAMA.layers * LLAMA.heads * LLAMA.head_dim * tokens * (tokens + 1) / 2
    assert ideal.prefill_s([(tokens, 0)]) == pytest.approx((linear + attention) / H100.bf16_flops, rel=0.01)


def test_context_costs_the_bytes_of_its_kv():
    _, s_per_token, until = Roofline(LLAMA, H100, 1, IDEAL).decode_line(8, 1000)
    assert s_per_token == pytest.approx(131072 / H100.hbm_bytes_per_s)
    assert until == inf


def test_eight_bit_weights_and_kv_are_quicker():
    bf16, fp8 = Roofline(LLAMA, H100, 1, IDEAL), Roofline(LLAMA, H100, 1, IDEAL, "fp8", "fp8")
    assert 1.7 < bf16.decode_s(1, 0) / fp8.decode_s(1, 0) < 2.0
    assert fp8.decode_line(1, 0)[1] == pytest.approx(bf16.decode_line(1, 0)[1] / 2)
    assert fp8.prefill_s([(4096, 0)]) < 0.6 * bf16.prefill_s([(4096, 0)])


def test_kv_heads_fewer_than_ranks_are_replicated():
    qwen = model("qwen2.5-7b")  # 28 heads, 4 KV heads
    four, seven = Roofline(qwen, H100, 4, IDEAL), Roofline(qwen, H100, 7, IDEAL)
    assert seven.decode_line(1, 0)[1] == pytest.approx(four.decode_line(1, 0)[1])


def test_every_rank_reads_all_of_mlas_compressed_vector():
    deepseek, h200 = model("deepseek-v3"), hardware("h200")
    whole = Roofline(deepseek, h200, 8, replace(IDEAL, attention_compute=1e9), "fp8")
    assert whole.decode_line(1, 0)[1] == pytest.approx(70272 / h200.hbm_bytes_per_s)
    absorbed = Roofline(deepseek, h200, 1, replace(IDEAL, attention_memory=1e9), "fp8").decode_line(1, 0)[1]
    assert absorbed == pytest.approx(61 * 2 * 128 * (2 * 512 + 64) / h200.bf16_flops)


def test_a_batch_reads_the_expected_distinct_experts():
    mixtral = model("mixtral-8x7b")
    ideal = Roofline(mixtral, H100, 2, replace(IDEAL, collective=1e9))

    def expert_read_s(batch):
        distinct = 8 * (1 - (1 - 2 / 8) ** batch)
        return 32 * distinct * mixtral.expert_params * 2 / 2 / H100.hbm_bytes_per_s

    grown = ideal.decode_s(4, 0) - ideal.decode_s(1, 0)
    assert grown == pytest.approx(expert_read_s(4) - expert_read_s(1), rel=0.02)


def test_tensor_parallelism_pays_two_all_reduces_a_layer():
    free = Roofline(LLAMA, H100, 4, replace(IDEAL, collective=1e9))
    paid = Roofline(LLAMA, H100, 4, replace(IDEAL, collective=0.5, collective_latency=1.0))
    tokens = 4096  # so many that the switch had better add
    one_s = 1.5 * 10e-6 + 5 / 4 * tokens * 4096 * 2 / (0.5 * 450e9)
    assert paid.prefill_s([(tokens, 0)]) - free.prefill_s([(tokens, 0)]) == pytest.approx(2 * 32 * one_s, rel=1e-4)


def test_small_all_reduces_take_a_kernels_latency():
    free = Roofline(LLAMA, H100, 8, replace(IDEAL, collective=1e9))
    paid = Roofline(LLAMA, H100, 8, replace(IDEAL, collective_latency=1.0))
    one_s = 16e-6 + 7 * 4096 * 2 / 450e9
    assert paid.decode_s(1, 0) - free.decode_s(1, 0) == pytest.approx(2 * 32 * one_s, rel=1e-4)


def test_pcie_without_peer_access_is_slower_than_with():
    rtx = hardware("rtx-pro-6000")
    peers = replace(rtx, name="peers")
    bare = Roofline(LLAMA, replace(rtx, pcie_bytes_per_s=1e18, name="peers"), 2, replace(IDEAL, collective_latency=0.0))
    prompt = [(4096, 0)]
    with_s, without_s = (Roofline(LLAMA, one, 2, IDEAL).prefill_s(prompt) - bare.prefill_s(prompt) for one in (peers, rtx))
    assert without_s / with_s == pytest.approx(0.7 / 0.22, rel=1e-3)


def test_without_scale_up_collectives_go_over_pcie():
    l40s = hardware("l40s")
    with_nvlink = replace(l40s, scaleup_bytes_per_s=450e9, scaleup_domain=8)
    assert Roofline(LLAMA, l40s, 4).prefill_s([(4096, 0)]) > 2 * Roofline(LLAMA, with_nvlink, 4).prefill_s([(4096, 0)])


def test_windowed_layers_stop_growing_at_the_window():
    cost = Roofline(model("mistral-7b-v0.1"), H100)
    _, slope, until = cost.decode_line(4, 1000)
    assert until == 4 * 4096
    assert slope > 0.0
    base_after, slope_after, forever = cost.decode_line(4, 4 * 4096)
    assert (slope_after, forever) == (0.0, inf)
    assert base_after == pytest.approx(cost.decode_s(4, 4 * 4096 - 1), rel=1e-4)


@pytest.mark.parametrize("cost", COSTS, ids=LABELS)
@given(batch=st.integers(1, 256), context=st.integers(0, 2_000_000), more=st.integers(0, 500_000))
def test_the_decode_line_is_exact_up_to_its_end(cost, batch, context, more):
    base_s, s_per_token, until = cost.decode_line(batch, context)
    if context + more < until:
        assert cost.decode_s(batch, context + more) == pytest.approx(base_s + s_per_token * (context + more), rel=1e-12)
    assert cost.decode_s(batch, context + more) >= cost.decode_s(batch, context)
    assert cost.decode_s(batch + 1, context) >= cost.decode_s(batch, context)


@pytest.mark.parametrize("cost", COSTS, ids=LABELS)
@given(chunks=chunks, batch=st.integers(1, 256), each=st.integers(1, 5000))
def test_a_mixed_step_lies_between_its_longer_part_and_their_sum(cost, chunks, batch, each):
    prefill_s, decode_s = cost.prefill_s(chunks), cost.decode_s(batch, batch * each)
    mixed_s = cost.mixed_s(chunks, batch, batch * each)
    assert max(prefill_s, decode_s) <= mixed_s * (1 + 1e-12)
    assert mixed_s <= prefill_s + decode_s


@pytest.mark.parametrize("cost", COSTS, ids=LABELS)
@given(chunks=chunks)
def test_prompts_computed_together_beat_one_by_one_and_order_is_irrelevant(cost, chunks):
    together = cost.prefill_s(chunks)
    assert together <= sum(cost.prefill_s([c]) for c in chunks) * (1 + 1e-12)
    assert together == pytest.approx(cost.prefill_s(chunks[::-1]))


@pytest.mark.parametrize("cost", COSTS, ids=LABELS)
def test_splitting_a_prompt_costs_only_overheads(cost):
    whole = cost.prefill_s([(4096, 0)])
    parts = cost.prefill_s([(2048, 0)]) + cost.prefill_s([(2048, 2048)])
    assert whole < parts < 1.6 * whole


def test_every_accelerators_family_has_coefficients():
    for name in hardware_names():
        assert hardware(name).family in coefficient_sets(), name
    assert coefficients("h100").calibrated
    assert not coefficients("ascend").calibrated
    assert coefficients("ascend").source.startswith("not calibrated")


def test_unknown_coefficients_offer_the_nearest():
    with pytest.raises(UsageError, match="unknown roofline coefficients 'h100-vlm': nearest are h100-vllm"):
        coefficients("h100-vlm")


def test_tp_must_divide_the_heads():
    with pytest.raises(UsageError, match="tp 5 does not divide"):
        Roofline(LLAMA, H100, 5)
