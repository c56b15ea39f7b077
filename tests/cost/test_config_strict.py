"""A key that decides a figure and is missing, misspelt or unknown is an error that names it; never a default."""

import copy
import json

import pytest

from pdlab.core.types import UsageError
from pdlab.cost.catalogue import model
from pdlab.cost.huggingface import parse
from tests.cost.published_configs import PUBLISHED

LLAMA = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False, "max_position_embeddings": 131072,
}  # fmt: skip
MIXTRAL = LLAMA | {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None}


def test_class_defaults_fill_a_text_config_and_are_said():
    read = parse({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240,
                                                          "num_hidden_layers": 34, "sliding_window": 1024}}, "m")  # fmt: skip
    assert read.filled["num_attention_heads"] == 8
    assert (read.model.kv_heads, read.model.head_dim, read.model.window_layers, read.model.max_positions) == (4, 256, 29, 131072)


def test_null_is_not_a_class_default():
    text = LLAMA | {"model_type": "mistral", "sliding_window": None}
    assert parse({"model_type": "mistral3", "text_config": text}, "m").model.window_layers == 0
    del text["sliding_window"]
    assert parse({"model_type": "mistral3", "text_config": text}, "m").model.window_tokens == 4096


REQUIRED = {
    "deepseek-v2-lite": [
        "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size", "kv_lora_rank", "n_routed_experts",
        "num_experts_per_tok", "moe_intermediate_size", "model_type",
    ],
    "glm-4-9b": ["hidden_size", "num_attention_heads", "multi_query_group_num", "kv_channels", "ffn_hidden_size"],
    "jamba-mini": ["num_experts", "num_experts_per_tok", "num_key_value_heads", "intermediate_size"],
    "minimax-text-01": ["attn_type_list", "num_local_experts", "num_experts_per_tok"],
    "nemotron-h-8b": ["hybrid_override_pattern", "hidden_size", "num_key_value_heads"],
    "mpt-30b": ["d_model", "n_heads", "expansion_ratio"],
    "arctic": ["num_local_experts", "num_experts_per_tok"],
    "gpt-oss-120b": ["num_local_experts", "num_key_value_heads", "sliding_window", "head_dim"],
    "ernie-4.5-21b": ["moe_num_experts", "moe_k", "moe_intermediate_size"],
    "hunyuan-a13b": ["num_experts", "moe_topk"],
    "kimi-linear": ["num_experts", "num_experts_per_token", "num_shared_experts", "kv_lora_rank", "first_k_dense_replace"],
    "internlm2-7b": ["num_hidden_layers", "intermediate_size"],
}  # fmt: skip


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, keys in REQUIRED.items() for key in keys])
def test_a_missing_key_is_an_error_that_names_it(name, key):
    config = copy.deepcopy(PUBLISHED[name][0])
    del config[key]
    with pytest.raises(UsageError, match="lacks '") as caught:
        parse(config, name)
    named = {"attn_type_list": "layer_types", "num_experts_per_token": "num_experts_per_tok"}.get(key, key)
    assert f"'{key}'" in str(caught.value) or f"'{named}'" in str(caught.value)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("num_key_value_heads", "n_kv_heads"),
        ("num_key_value_heads", "num_key_value_head"),
        ("num_key_value_heads", "num_kv_groups"),
        ("num_key_value_heads", "num_query_groups"),
        ("num_key_value_heads", "kv_head_num"),
        ("num_local_experts", "expert_count"),
        ("num_local_experts", "moe_experts"),
        ("num_experts_per_tok", "moe_top_k"),
        ("intermediate_size", "ffn_width"),
        ("vocab_size", "vocabulary_size"),
        ("hidden_size", "hidden_dim"),
        ("num_hidden_layers", "layers"),
    ],
)
def test_a_misspelt_key_is_an_error(right, wrong):
    config = dict(MIXTRAL)
    config[wrong] = config.pop(right)
    with pytest.raises(UsageError, match=f"'({right}|{wrong})'"):
        parse(config, "m")


@pytest.mark.parametrize(
    "extra",
    [
        {"num_local_experts": 8}, {"n_routed_experts": 64}, {"swa_window": 4096}, {"kv_lora_rank": 512}, {"mamba_d_state": 16},
        {"block_configs": [{"attention": {"no_op": True}}]}, {"num_memory_layers": 4}, {"cross_attention_layers": [3, 8]},
        {"shared_expert_intermediate_size": 512}, {"hybrid_layer_ids": [1]}, {"attn_layer_indices": [3]}, {"tie_embeddings": True},
    ],
    ids=lambda extra: next(iter(extra)),
)  # fmt: skip
def test_a_key_that_would_decide_a_figure_and_is_not_known_is_an_error(extra):
    with pytest.raises(UsageError, match=f"'{next(iter(extra))}', which looks as if it decided a figure") as caught:
        parse(LLAMA | extra, "m")
    assert "remove it" in str(caught.value)


def test_keys_that_decide_nothing_are_ignored_and_listed():
    read = parse(LLAMA | {"rope_theta": 5e5, "bos_token_id": 1, "my_note": "x", "hidden_act": "silu"}, "m")
    assert set(read.ignored) == {"rope_theta", "bos_token_id", "my_note", "hidden_act"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "lama"}, "unknown model_type 'lama'; nearest is llama"),
        ({"model_type": "bert"}, "'bert' is an encoder"),
        ({"model_type": "t5"}, "'t5' is an encoder-decoder"),
        ({"model_type": "mamba2"}, "keeps a state and no KV"),
        ({"model_type": "zamba2"}, "'zamba2' runs one attention layer's weights at many depths"),
        ({"is_encoder_decoder": True}, "is an encoder-decoder"),
        ({"layer_types": ["full_attention"] * 31}, "lists 31 layers, and there are 32"),
        ({"layer_types": ["sideways_attention"] * 32}, "layer_types[0] is 'sideways_attention'"),
        ({"layer_types": ["sliding_attention"] * 32}, "lacks 'sliding_window'"),
        ({"layer_types": ["linear_attention"] * 32}, "not known to have"),
        ({"num_hidden_layers": "32"}, "num_hidden_layers must be a whole number"),
        ({"num_hidden_layers": 10**12}, "is more than the 10000 layers"),
        ({"model_type": "nemotron_h", "hybrid_override_pattern": "M-M-", "num_hidden_layers": 4, "mamba_num_heads": 8, "head_dim": 128},
         "no layer keeps KV"),
        ({"num_hidden_layers": 32.5}, "num_hidden_layers must be a whole number"),
        ({"num_attention_heads": 0}, "num_attention_heads must be positive"),
        ({"hidden_size": -4096}, "hidden_size must be positive"),
        ({"hidden_size": 4097}, "is no multiple of 32 heads"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        ({"num_key_value_heads": [8, 8]}, "num_key_value_heads must be a whole number"),
    ],
)  # fmt: skip
def test_values_that_cannot_be_are_named(change, says):
    with pytest.raises(UsageError) as caught:
        parse(LLAMA | change, "m")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_heads_that_share_no_whole_number_of_kv_heads_are_an_error():
    with pytest.raises(UsageError, match="num_attention_heads 32 is not a multiple of num_key_value_heads 5"):
        parse(LLAMA | {"num_key_value_heads": 5}, "m")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("adapter_config.json", {"peft_type": "LORA", "r": 8}, "is an adapter, not a model's config.json"),
        ("generation_config.json", {"temperature": 0.6, "eos_token_id": 2}, "is a generation_config.json, not"),
        ("tokenizer_config.json", {"tokenizer_class": "X"}, "is a tokenizer's file, not"),
        ("model.safetensors.index.json", {"metadata": {}, "weight_map": {}}, "is an index of weights, not"),
    ],
)
def test_another_file_of_a_models_folder_is_told(tmp_path, name, content, says):
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(UsageError, match=says):
        model(str(tmp_path / name))


def test_more_experts_a_token_than_there_are_is_an_error():
    with pytest.raises(UsageError, match=r"a token meets 9 experts .* there are 8"):
        parse(MIXTRAL | {"num_experts_per_tok": 9}, "m")


@pytest.mark.parametrize(
    ("family", "more", "windowed"),
    [
        ("llama", {"sliding_window": 4096}, 0),
        ("mistral", {"sliding_window": 4096}, 32),
        ("mistral", {"sliding_window": None}, 0),
        ("qwen2", {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28}, 0),
        ("qwen2", {"sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 28}, 4),
        ("gemma2", {"sliding_window": 4096, "head_dim": 256}, 16),
        ("gemma3_text", {"sliding_window": 512, "head_dim": 256}, 27),
        ("gemma3_text", {"sliding_window": 512, "head_dim": 256, "sliding_window_pattern": 4}, 24),
        ("cohere2", {"sliding_window": 4096}, 24),
        ("exaone4", {"sliding_window": 4096, "sliding_window_pattern": "LLLG"}, 24),
        ("exaone4", {"sliding_window": None}, 0),
        ("olmo3", {"sliding_window": 4096}, 24),
        ("phi3", {"sliding_window": 2047}, 32),
        ("starcoder2", {"sliding_window": 4096}, 32),
        ("olmo3", {"sliding_window": 4096, "layer_types": ["sliding_attention"] * 8 + ["full_attention"] * 24}, 8),
    ],
)
def test_windows_follow_the_family_or_the_list(family, more, windowed):
    m = parse(LLAMA | {"model_type": family} | more, "m").model
    assert m.window_layers == windowed
    assert m.window_tokens == (more["sliding_window"] if windowed else 0)
    full = m.layers - windowed
    tokens, each = 100_000, 4 * m.kv_heads * m.head_dim
    assert m.kv_bytes_per_sequence(tokens) == each * (full * tokens + windowed * min(tokens, m.window_tokens))
