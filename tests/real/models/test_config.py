"""The engine and the simulator understand a config alike, and the engine names what it cannot run."""

import json

import pytest

from pdlab.core.types import UsageError
from pdlab.cost.catalogue import model as catalogue_model
from pdlab.cost.huggingface import parse
from pdlab.real.models import config as engine_config

BASE = {
    "vocab_size": 3000, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6, "num_attention_heads": 8,
    "num_key_value_heads": 2, "max_position_embeddings": 4096, "torch_dtype": "bfloat16",
}  # fmt: skip
MIXED = ["sliding_attention", "full_attention"] * 3


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("llama", {}),
        ("llama", {"num_key_value_heads": None}),
        ("llama", {"head_dim": 96, "tie_word_embeddings": True}),
        ("llama", {"sliding_window": 128}),
        ("mistral", {"sliding_window": 128}),
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": 128, "layer_types": MIXED}),
        ("qwen2", {"sliding_window": 128, "use_sliding_window": False, "max_window_layers": 2}),
        ("qwen2", {"sliding_window": 128, "use_sliding_window": True, "max_window_layers": 2}),
        ("qwen2", {"sliding_window": 128, "use_sliding_window": True, "layer_types": MIXED}),
        ("qwen3", {"head_dim": 128, "tie_word_embeddings": True}),
    ],
)
def test_the_engine_and_the_simulator_read_one_shape(family, more):
    config = BASE | {"model_type": family} | more
    own, model = engine_config.parse(config, "m", "m"), parse(config, "m").model
    for key in ("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocab", "tied", "max_positions"):
        assert getattr(own, key) == getattr(model, key), key
    assert own.kv_bytes_per_token(2) == model.kv_bytes_per_token()
    assert sum(window > 0 for window in own.windows) == model.window_layers
    assert max(own.windows) == model.window_tokens


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"model_type": "gemma2"}, "model_type 'gemma2' is not one of"),
        ({"num_local_experts": 8}, "'num_local_experts', which looks as if it decided a figure"),
        ({"kv_lora_rank": 512}, "'kv_lora_rank', which looks as if it decided a figure"),
        ({"layer_types": ["linear_attention"] * 6}, "layer_types[0] is 'linear_attention'"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "quantised with compressed-tensors are not supported"),
        ({"max_position_embeddings": None}, "lacks 'max_position_embeddings'"),
        ({"num_attention_heads": 7}, "is no multiple of 7 heads"),
    ],
)  # fmt: skip
def test_the_engine_names_what_it_cannot_run(more, says):
    with pytest.raises(UsageError) as caught:
        engine_config.parse(BASE | {"model_type": "llama"} | more, "m", "m")
    assert says in str(caught.value)


def test_a_quantisation_that_a_file_beside_the_config_says_is_refused_too(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(BASE | {"model_type": "llama"}))
    assert engine_config.read(tmp_path).layers == 6
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    with pytest.raises(UsageError, match=r"quantised with .* are not supported"):
        engine_config.read(tmp_path)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("deepseek-v2-lite", "routed experts run here for mixtral, qwen3_moe only"),
        ("glm-4.5-air", "routed experts run here for mixtral, qwen3_moe only"),
        ("opt-13b", "only models of the families llama, mistral, qwen2"),
    ],
)
def test_a_model_of_the_catalogue_that_does_not_run_here_is_refused(name, says):
    with pytest.raises(UsageError, match=f"model {name}: {says}"):
        engine_config.of_catalogue(name)


@pytest.mark.parametrize(("name", "experts", "per_token"), [("qwen3-30b-a3b", 128, 8), ("mixtral-8x7b", 8, 2)])
def test_a_model_of_the_catalogue_has_its_experts(name, experts, per_token):
    own, model = engine_config.of_catalogue(name), catalogue_model(name)
    assert own.moe is not None and (own.moe.experts, own.moe.per_token, own.moe.renormalise) == (experts, per_token, True)
    assert own.moe.width == model.expert_ffn
    assert all(own.moe.layers) and len(own.moe.layers) == model.layers


@pytest.mark.parametrize(
    ("family", "more", "says"),
    [
        ("qwen2_moe", {"num_experts": 4, "num_experts_per_tok": 2}, "model_type 'qwen2_moe' is not one of"),
        ("qwen3_moe", {"num_experts": 2, "num_experts_per_tok": 4, "moe_intermediate_size": 64}, "a token meets 4 experts"),
    ],
)
def test_experts_that_do_not_run_here_are_named(family, more, says):
    with pytest.raises(UsageError, match=says):
        engine_config.parse(BASE | {"model_type": family} | more, "m", "m")


def test_some_layers_have_experts_and_the_others_one_width():
    more = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "mlp_only_layers": [0, 3], "norm_topk_prob": False}
    own = engine_config.parse(BASE | {"model_type": "qwen3_moe"} | more, "m", "m")
    assert own.moe is not None
    assert own.moe.layers == (False, True, True, False, True, True)
    assert (own.ffn, own.moe.width, own.moe.renormalise, own.qk_norm) == (1408, 64, False, True)
    assert own.widest_feed_forward == 1408


def test_a_model_of_the_catalogue_has_the_shape_that_the_simulator_takes():
    own, model = engine_config.of_catalogue("qwen3-8b"), catalogue_model("qwen3-8b")
    assert (own.layers, own.heads, own.kv_heads, own.ffn, own.qk_norm) == (model.layers, model.heads, model.kv_heads, model.ffn, True)
