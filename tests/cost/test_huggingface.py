import json

import pytest

from pdlab.core.types import UsageError
from pdlab.cost.catalogue import model

LLAMA = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False, "max_position_embeddings": 131072,
}  # fmt: skip
OPT = {
    "model_type": "opt", "hidden_size": 5120, "ffn_dim": 20480, "num_hidden_layers": 40, "num_attention_heads": 40, "vocab_size": 50272,
    "max_position_embeddings": 2048,
}  # fmt: skip
BLOOM = {"model_type": "bloom", "hidden_size": 14336, "n_layer": 70, "n_head": 112, "vocab_size": 250880}
MISTRAL = {
    "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 32000, "sliding_window": 4096, "tie_word_embeddings": False,
}  # fmt: skip
MIXTRAL = MISTRAL | {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None}
QWEN2 = {
    "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False, "sliding_window": 131072, "use_sliding_window": False,
}  # fmt: skip
QWEN3 = {
    "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True,
}  # fmt: skip
QWEN3_MOE = {
    "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936, "num_experts": 128, "num_experts_per_tok": 8,
    "moe_intermediate_size": 768, "decoder_sparse_step": 1, "mlp_only_layers": [], "tie_word_embeddings": False,
}  # fmt: skip
DEEPSEEK = {
    "model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432, "num_hidden_layers": 61, "num_attention_heads": 128,
    "num_key_value_heads": 128, "vocab_size": 129280, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048, "first_k_dense_replace": 3, "quantization_config": {"quant_method": "fp8"}, "tie_word_embeddings": False,
}  # fmt: skip
GPT_OSS = {
    "model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24, "num_attention_heads": 64,
    "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 201088, "num_local_experts": 32, "num_experts_per_tok": 4,
    "sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"] * 12, "quantization_config": {"quant_method": "mxfp4"},
    "tie_word_embeddings": False,
}  # fmt: skip
MAVERICK = {
    "model_type": "llama4",
    "text_config": {
        "model_type": "llama4_text", "hidden_size": 5120, "intermediate_size": 8192,
        "intermediate_size_mlp": 16384, "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128,
        "vocab_size": 202048, "num_local_experts": 128,
        "num_experts_per_tok": 1, "interleave_moe_layer_step": 2, "attention_chunk_size": 8192, "tie_word_embeddings": False,
    },
}  # fmt: skip
SHAPE = ("layers", "heads", "kv_heads", "head_dim", "experts_per_token", "window_tokens", "window_layers", "weight_dtype", "tied", "gated")


def write(tmp_path, config):
    folder = tmp_path / "some-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (LLAMA, "llama-3.1-8b"),
        (OPT, "opt-13b"),
        (BLOOM, "bloom-176b"),
        (MISTRAL, "mistral-7b-v0.1"),
        (MIXTRAL, "mixtral-8x7b"),
        (QWEN2, "qwen2.5-7b"),
        (QWEN3, "qwen3-0.6b"),
        (QWEN3_MOE, "qwen3-30b-a3b"),
        (DEEPSEEK, "deepseek-v3"),
        (GPT_OSS, "gpt-oss-20b"),
        (MAVERICK, "llama-4-maverick-17b-128e"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_config_gives_the_catalogues_model(tmp_path, config, name):
    read, known = model(str(write(tmp_path, config) / "config.json")), model(name)
    assert read.name == "some-model"
    assert read.total_params == known.total_params
    assert read.active_params == known.active_params
    assert read.kv_bytes_per_token() == known.kv_bytes_per_token()
    for field in SHAPE:
        if field == "head_dim" and known.kv_lora_rank:
            continue
        assert getattr(read, field) == getattr(known, field), field


def test_a_folder_and_a_relative_path_are_read_too(tmp_path):
    folder = write(tmp_path, LLAMA)
    assert model(str(folder)).layers == 32
    assert model("some-model/config.json", base_dir=tmp_path).layers == 32


def test_a_missing_key_is_named(tmp_path):
    folder = write(tmp_path, {k: v for k, v in LLAMA.items() if k != "vocab_size"})
    with pytest.raises(UsageError, match="lacks 'vocab_size'"):
        model(str(folder))


@pytest.mark.parametrize(
    ("text", "reason"), [("{", "is not JSON"), ("[]", "is not a JSON object"), ('{"num_hidden_layers": "x"}', "wrong kind")]
)
def test_a_malformed_config_is_one_clear_line(tmp_path, text, reason):
    path = tmp_path / "config.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=reason):
        model(str(path))


def test_a_missing_file_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="No such file"):
        model(str(tmp_path / "config.json"))


def test_non_positive_sizes_are_refused(tmp_path):
    with pytest.raises(UsageError, match="must be positive"):
        model(str(write(tmp_path, LLAMA | {"num_key_value_heads": 0})))
