"""The roofline counts what was understood of a config: parts that stay wide, windows of several widths, states."""

from math import inf

import pytest

from pdlab.cost.capacity import kv_capacity_tokens
from pdlab.cost.catalogue import hardware, model
from pdlab.cost.huggingface import parse
from pdlab.cost.roofline import Coefficients, Roofline
from pdlab.cost.shapes import Part
from tests.cost.published_configs import PUBLISHED

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
H100 = hardware("h100")
QWEN = {
    "model_type": "qwen3", "num_hidden_layers": 36, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128, "intermediate_size": 12288, "vocab_size": 151936, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
ATTENTION_WIDE = {"quant_method": "fp8", "modules_to_not_convert": ["self_attn", "lm_head"]}


def of(name):
    return parse(PUBLISHED[name][0], name).model


def test_a_decode_step_reads_each_part_in_its_own_format():
    m = parse(QWEN | {"quantization_config": ATTENTION_WIDE}, "m").model
    read = 2 * m.params(Part.ATTENTION) + m.params(Part.MLP) + 2 * m.head_params
    assert Roofline(m, H100, 1, IDEAL, m.weight_dtype).decode_s(1, 0) == pytest.approx(read / H100.hbm_bytes_per_s, rel=2e-3)


def test_each_part_is_computed_at_its_own_peak():
    m = parse(QWEN | {"quantization_config": ATTENTION_WIDE}, "m").model
    cost, tokens = Roofline(m, H100, 1, IDEAL, m.weight_dtype), 1 << 15
    pairs = 4 * m.layers * m.heads * m.head_dim * tokens * (tokens + 1) / 2
    seconds = (2 * tokens * m.params(Part.ATTENTION) + pairs) / H100.bf16_flops + 2 * tokens * m.params(Part.MLP) / H100.fp8_flops
    assert cost.prefill_s([(tokens, 0)]) == pytest.approx(seconds, rel=0.01)


def test_weight_only_quantisation_computes_in_bf16():
    both = [parse(QWEN | {"quantization_config": {"quant_method": "gptq", "bits": b, "group_size": 128}}, "m").model for b in (4, 8)]
    four, eight = (Roofline(m, H100, 1, IDEAL, m.weight_dtype).prefill_s([(8192, 0)]) for m in both)
    plain = Roofline(parse(QWEN, "m").model, H100, 1, IDEAL).prefill_s([(8192, 0)])
    assert four == pytest.approx(plain, rel=0.01) and eight == pytest.approx(plain, rel=0.01)


def test_windows_of_two_widths_bend_the_line_twice():
    kinds = ["sliding_attention", "full_attention"] * 3
    text = {"model_type": "llama4_text", "num_hidden_layers": 6, "hidden_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 8,
            "head_dim": 128, "intermediate_size": 1024, "intermediate_size_mlp": 1024, "vocab_size": 1000, "num_local_experts": 2,
            "num_experts_per_tok": 1, "interleave_moe_layer_step": 1, "sliding_window": 256, "attention_chunk_size": 1024,
            "layer_types": [*kinds[:3], "chunked_attention", *kinds[4:]], "tie_word_embeddings": False}  # fmt: skip
    cost = Roofline(parse(text, "m").model, H100, 1, IDEAL)
    ends = []
    context = 0
    while context != inf:
        _, slope, until = cost.decode_line(4, context)
        ends.append((slope, until))
        context = until
    assert [until for _, until in ends] == [4 * 256, 4 * 1024, inf]
    assert [slope / ends[-1][0] for slope, _ in ends] == pytest.approx([6 / 2, 3 / 2, 1])
    for edge in (4 * 256, 4 * 1024):
        assert cost.decode_s(4, edge) == pytest.approx(cost.decode_s(4, edge - 1), rel=1e-3)


@pytest.mark.parametrize("name", ["nemotron-h-8b", "kimi-linear", "minimax-text-01"])
def test_recurrent_layers_read_a_state_and_no_kv(name):
    m = of(name)
    cost = Roofline(m, hardware("h200"), 8, IDEAL)
    base, slope, until = cost.decode_line(2, 0)
    assert slope <= m.kv_bytes_per_token("bf16", 8) / 8 / hardware("h200").hbm_bytes_per_s * (1 + 1e-9) or m.kv_lora_rank
    assert until == inf
    without = parse(PUBLISHED[name][0], name).model
    assert m.state_bytes == without.state_bytes > 0
    more = cost.decode_line(64, 0)[0] - base
    assert more > 62 * 2 * m.state_bytes / 8 / hardware("h200").hbm_bytes_per_s


def test_states_take_memory_for_as_many_sequences_as_may_run():
    m = of("nemotron-h-8b")
    none, many = (kv_capacity_tokens(m, H100, max_seqs=n) for n in (0, 256))
    assert (none - many) * m.kv_bytes_per_token() == pytest.approx(256 * m.state_bytes, rel=1e-3)
    dense = model("llama-3.1-8b")
    assert kv_capacity_tokens(dense, H100, max_seqs=256) == kv_capacity_tokens(dense, H100)


def test_a_nemotron_layer_is_one_all_reduce():
    assert of("nemotron-h-8b").reductions == 52
    assert model("llama-3.1-8b").reductions == 64
