"""Configs of other kinds than the published ones of `published_configs`, and what may stand in one."""

import copy
import json

import pytest

from pdlab.core.types import UsageError
from pdlab.cost.catalogue import model
from pdlab.cost.huggingface import parse
from pdlab.cost.shapes import Part
from tests.cost.published_configs import PUBLISHED
from tests.cost.recalled_configs import RECALLED
from tests.cost.test_config_strict import LLAMA, MIXTRAL
from tests.cost.test_quantization import DENSE, FP8, GPTQ, INT4, ct, of, share


@pytest.mark.parametrize("name", RECALLED)
def test_figures_are_those_of_the_model_card(name):
    config, billions, kv_kib, active_b, weights_gb = RECALLED[name]
    m = parse(config, name).model
    assert m.total_params == pytest.approx(billions * 1e9, rel=0.012)
    assert m.kv_bytes_per_token() == kv_kib * 1024
    if active_b is not None:
        assert m.active_params == pytest.approx(active_b * 1e9, rel=0.05)
    if weights_gb is not None:
        assert m.weights_bytes() == pytest.approx(weights_gb * 1e9, rel=0.01)


OCR = {
    "model_type": "deepseek_vl_v2", "vision_config": {}, "language_config": {
        "architectures": ["DeepseekOCRForCausalLM"], "model_type": "deepseek_v2", "hidden_size": 1280, "intermediate_size": 6848,
        "kv_lora_rank": None, "q_lora_rank": None, "qk_nope_head_dim": 0, "qk_rope_head_dim": 0, "v_head_dim": 0, "use_mla": False,
        "moe_intermediate_size": 896, "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6,
        "first_k_dense_replace": 1, "num_attention_heads": 10, "num_key_value_heads": 10, "num_hidden_layers": 12, "vocab_size": 129280,
        "moe_layer_freq": 1, "tie_word_embeddings": False, "max_position_embeddings": 8192, "torch_dtype": "bfloat16",
    },
}  # fmt: skip


def test_deepseek_without_mla_has_keys_and_values():
    m = parse(OCR, "ocr").model
    assert m.kv_bytes_per_token() == 12 * 2 * 1280 * 2
    assert m.total_params == pytest.approx(2.93e9, rel=0.01)


def test_a_text_part_without_model_type_goes_by_its_class():
    config = copy.deepcopy(OCR)
    config["language_config"]["architectures"] = ["DeepseekV2ForCausalLM"]
    del config["language_config"]["model_type"]
    assert parse(config, "m").model_type == "deepseek_v2"


@pytest.mark.parametrize("kind", ["mllama", "t5gemma", "whisper", "siglip", "moshi"])
def test_a_whole_that_is_refused_is_refused_whatever_its_text_part(kind):
    with pytest.raises(UsageError, match=f"'{kind}'"):
        parse({"model_type": kind, "text_config": LLAMA}, "m")


@pytest.mark.parametrize(
    ("name", "key"),
    [("minimax-text-01", "num_key_value_heads"),
     ("mistral", "sliding_window"), ("kimi-k2", "q_lora_rank"), ("mimo-7b", "num_key_value_heads"),
     ("qwen2.5-vl-7b", "num_key_value_heads"), ("glm-4.6-fp8", "weights")],
)  # fmt: skip
def test_a_key_whose_class_has_a_value_of_its_own_is_not_guessed(name, key):
    table = PUBLISHED | RECALLED | {"mistral": (LLAMA | {"model_type": "mistral", "sliding_window": None},)}
    config = copy.deepcopy(table[name][0])
    del (config["quantization_config"]["config_groups"]["group_0"] if key == "weights" else config)[key]
    with pytest.raises(UsageError, match=f"lacks '{key}'"):
        parse(config, name)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (RECALLED["deepseek-v3"][0] | {"n_routed_experts": -1}, "n_routed_experts must be at least 0, not -1"),
        (RECALLED["ernie-300b"][0] | {"moe_k": -1}, "moe_k must be positive"),
        (RECALLED["ernie-300b"][0] | {"moe_intermediate_size": 0}, "moe_intermediate_size must be positive"),
        (RECALLED["ernie-300b"][0] | {"moe_layer_start_index": -2}, "moe_layer_start_index must be at least 0"),
        (RECALLED["qwen1.5-moe"][0] | {"use_sliding_window": "x"}, "use_sliding_window must be true or false"),
        (LLAMA | {"tie_word_embeddings": 7}, "tie_word_embeddings must be true or false, not 7"),
        (LLAMA | {"vocab_size": 10**30}, "vocab_size is more than 1,000,000,000"),
        (LLAMA | {"v_head_dim": 64}, "v_head_dim is 64 and head_dim 128"),
        (PUBLISHED["mpt-30b"][0] | {"expansion_ratio": float("inf")}, "wrong kind"),
        (PUBLISHED["lfm2-1.2b"][0] | {"block_multiple_of": 0}, "block_multiple_of must be positive"),
        (PUBLISHED["lfm2-1.2b"][0] | {"block_ffn_dim_multiplier": float("inf")}, "wrong kind"),
    ],
)
def test_values_that_cannot_be_are_named(config, says):
    with pytest.raises(UsageError) as caught:
        parse(config, "m")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_values_as_wide_as_keys_are_read_and_so_is_a_context_of_no_bound():
    read = parse(LLAMA | {"v_head_dim": 128, "max_position_embeddings": 10**30}, "m")
    assert read.model.max_positions == 10**30
    assert read.model.main.v_dim == 128


def test_a_config_with_a_byte_order_mark_is_read(tmp_path):
    (tmp_path / "config.json").write_text("\ufeff" + json.dumps(LLAMA | {"torch_dtype": "bfloat16"}), encoding="utf-8")
    assert model(str(tmp_path)).layers == 32


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ({"quant_method": "compressed-tensors", "config_groups": {"g": {"targets": "Linear", "weights": FP8}}}, "g.targets must be a list"),
        (ct(FP8, FP8, "float-quantized", targets=["LlamaMLP"]), "unknown class 'LlamaMLP'"),
        (ct(FP8, FP8, "float-quantized", targets=["re:.*experts.*"]), "names no module of this model"),
        (ct(FP8, FP8, "float-quantized", ignore=["re:.*"]), "names no module of this model"),
        ({"quant_method": "mxfp4"}, "names no module of this model"),
        (ct(INT4 | {"group_size": 0}), "group_size must be positive, or -1"),
        (ct(FP8, {"num_bits": float("inf"), "type": "float"}, "float-quantized"), "num_bits must be a whole number, not inf"),
        ({"quant_method": "fp8", "weight_block_size": 128}, "weight_block_size must be two whole numbers"),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "weight_block_size must be positive"),
    ],
)
def test_a_quantisation_that_reaches_nothing_is_not_passed_over(written, says):
    with pytest.raises(UsageError) as caught:
        of(DENSE, written)
    assert says in str(caught.value)


ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": True, "data_type": "int"}


def test_auto_rounds_names_may_be_regular_expressions():
    assert share(of(DENSE, ROUND | {"extra_config": {".*self_attn.*": {"bits": 8}}}), Part.ATTENTION, "int8") == 1
    assert share(of(DENSE, ROUND | {"extra_config": {".*mlp.*": {"bits": 16, "data_type": "float"}}}), Part.MLP, "bf16") == 1


def test_gptq_quantises_the_modules_it_lists_and_no_others():
    listed = [["self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj"], ["self_attn.o_proj"]]
    m = of(DENSE, GPTQ | {"modules_in_block_to_quantize": listed})
    assert share(m, Part.ATTENTION, "wint4") == share(m, Part.MLP, "bf16") == 1


@pytest.mark.parametrize(("block", "scale", "size"), [([1, 32], None, 1 + 4 / 32), ([1, 32], "ue8m0", 1 + 1 / 32), ([128, 128], None, 1)])
def test_scales_of_small_blocks_count(block, scale, size):
    m = of(DENSE, {"quant_method": "fp8", "weight_block_size": block, "scale_fmt": scale})
    assert next(w for w in m.weights if w.part is Part.MLP).format.bytes_per_value == size


def test_one_expert_is_none_and_its_other_keys_decide_nothing():
    jamba = PUBLISHED["jamba-mini"][0] | {"num_experts": 1, "num_experts_per_tok": 1}
    assert parse(jamba, "m").model.experts == 0


def test_what_a_multimodal_model_has_beside_its_text_is_said():
    flat = RECALLED["qwen2.5-vl-7b"][0]
    assert any("only the text part" in remark for remark in parse(flat, "m").remarks)
    assert not any("only the text part" in remark for remark in parse(MIXTRAL, "m").remarks)
