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
        (
            "glm-4.5-air",
            "routed experts run here for mixtral, qwen3_moe, ernie4_5_moe, deepseek_v2, deepseek_v3, gpt_oss, llama4_text only",
        ),
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
    ("name", "family"),
    [
        ("gpt-oss-20b", "gpt_oss"),
        ("ernie-4.5-21b-a3b", "ernie4_5_moe"),
        ("deepseek-v2-lite", "deepseek_v2"),
        ("kimi-k2", "deepseek_v3"),
        ("llama-4-scout-17b-16e", "llama4_text"),
    ],
)
def test_the_catalogue_knows_families_by_name(name, family):
    own, model = engine_config.of_catalogue(name), catalogue_model(name)
    assert own.family == family
    assert own.kv_bytes_per_token(2) == model.kv_bytes_per_token()


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


MLA = {
    "num_key_value_heads": 8, "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "n_shared_experts": 2,
    "first_k_dense_replace": 1, "kv_lora_rank": 512, "q_lora_rank": None, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128,
    "v_head_dim": 128,
}  # fmt: skip


def test_mla_keeps_one_head_and_no_values_beside_its_keys():
    config = BASE | MLA | {"model_type": "deepseek_v2"}
    own = engine_config.parse(config, "m", "m")
    assert (own.kv_planes, own.kv_heads, own.head_dim, own.rotated_dims) == (1, 1, 576, 64)
    assert own.kv_bytes_per_token(2) == 6 * 576 * 2 == parse(config, "m").model.kv_bytes_per_token()
    assert own.scale == pytest.approx(192**-0.5)


def test_kimi_k2_is_deepseek_v3_by_another_name():
    config = BASE | MLA | {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.827, "tie_word_embeddings": False}
    kimi, deepseek = (engine_config.parse(config | {"model_type": name}, "m", "m") for name in ("kimi_k2", "deepseek_v3"))
    assert kimi == deepseek
    assert kimi.moe is not None and (kimi.moe.scale, kimi.moe.groups, kimi.moe.correction) == (2.827, 1, True)


def test_llama_4_has_chunks_where_it_has_rotary_positions():
    config = BASE | {"model_type": "llama4_text", "num_hidden_layers": 8, "num_local_experts": 4, "num_experts_per_tok": 1}
    config |= {"interleave_moe_layer_step": 2, "intermediate_size_mlp": 2048, "attention_chunk_size": 1024, "head_dim": 64}
    own = engine_config.parse(config, "m", "m")
    assert own.windows == (1024, 1024, 1024, 0) * 2
    assert own.chunked is not None and own.chunked.ropeless == (False, False, False, True) * 2
    assert own.chunked.temper == (0.1, 8192.0) and own.chunked.unit_norm
    assert own.moe is not None and own.moe.layers == (False, True) * 4
    assert (own.ffn, own.moe.width, own.moe.shared, own.moe.inward) == (2048, 1408, 1408, True)


@pytest.mark.parametrize(
    ("family", "more", "says"),
    [
        ("deepseek_v3", {"n_group": 3, "topk_group": 2}, "8 experts in n_group 3"),
        ("deepseek_v3", {"n_group": 8, "topk_group": 1}, "1 groups of 1 experts are too few for 3"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method 'noaux_tc' is not one of"),
        ("deepseek_v2", {"attention_bias": True}, "attention_bias is not supported for deepseek_v2"),
        ("deepseek_v32", {}, "model_type 'deepseek_v32' is not one of"),
    ],
)
def test_mla_that_does_not_run_here_is_named(family, more, says):
    with pytest.raises(UsageError, match=says):
        engine_config.parse(BASE | MLA | {"model_type": family} | more, "m", "m")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0 is not supported"),
        ({"hidden_activation": "relu"}, "hidden_activation 'relu' is not supported, only gelu_pytorch_tanh"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "weights quantised with mxfp4 are not supported"),
        ({"quantization_config": {"quant_method": "fp8"}}, "weights quantised with fp8 are not supported"),
    ],
)
def test_what_gemma_may_say_and_does_not_run_here_is_named(more, says):
    with pytest.raises(UsageError, match=says):
        engine_config.parse(BASE | {"model_type": "gemma3_text", "sliding_window": 512} | more, "m", "m")


def test_gemma_has_two_rotations_in_either_spelling():
    old = {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    new = {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }
    }
    ropes = []
    for written in (old, new):
        own = engine_config.parse(BASE | {"model_type": "gemma3_text", "sliding_window": 512, "head_dim": 64} | written, "m", "m")
        ropes.append((own.rope.theta, own.rope.scaling, own.rope.factor, own.rope_local))
        assert [window > 0 for window in own.windows] == [True] * 5 + [False]
    assert ropes[0] == ropes[1]


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
