"""Weights by name, from a Hugging Face folder, a GGUF file, or at random. One tensor at a time, so that loading needs no second copy."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pdlab.core.types import UsageError
from pdlab.kernels.linear import NarrowWeight
from pdlab.real.models import moe
from pdlab.real.models.config import ModelConfig
from pdlab.real.models.narrow import NarrowReader, part_of, wide_shape, widened
from pdlab.real.models.ranks import Ranks, WeightPart

KV_SCALES = (".k_scale", ".v_scale", ".kv_scale", ".k_proj.output_scale", ".v_proj.output_scale")


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor the model needs: its Hugging Face name and shape."""
    c = config
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c.vocab, c.hidden), "model.norm.weight": (c.hidden,)}
    if not c.tied:
        found["lm_head.weight"] = (c.vocab, c.hidden)
    for layer in range(c.layers):
        at = f"model.layers.{layer}"
        found[f"{at}.input_layernorm.weight"] = (c.hidden,)
        found[f"{at}.post_attention_layernorm.weight"] = (c.hidden,)
        found.update(_latent(c, f"{at}.self_attn") if c.latent is not None else _softmax(c, f"{at}.self_attn"))
        if c.sandwich:
            found[f"{at}.pre_feedforward_layernorm.weight"] = found[f"{at}.post_feedforward_layernorm.weight"] = (c.hidden,)
        if c.moe is not None and c.has_experts(layer):
            found.update(moe.shapes(c.moe, c.family, c.hidden, layer))
            continue
        module = moe.names(c.family).module if c.chunked is not None else "mlp"
        for name, out, inner in (("gate_proj", c.ffn, c.hidden), ("up_proj", c.ffn, c.hidden), ("down_proj", c.hidden, c.ffn)):
            found[f"{at}.{module}.{name}.weight"] = (out, inner)
            if c.mlp_bias:
                found[f"{at}.{module}.{name}.bias"] = (out,)
    return found


def _softmax(c: ModelConfig, at: str) -> dict[str, tuple[int, ...]]:
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    found: dict[str, tuple[int, ...]] = {}
    for name, width in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
        found[f"{at}.{name}.weight"] = (width, c.hidden)
        if c.qkv_bias:
            found[f"{at}.{name}.bias"] = (width,)
    found[f"{at}.o_proj.weight"] = (c.hidden, q)
    if c.out_bias:
        found[f"{at}.o_proj.bias"] = (c.hidden,)
    if c.qk_norm:
        found[f"{at}.q_norm.weight"] = found[f"{at}.k_norm.weight"] = (c.head_dim,)
    if c.sinks:
        found[f"{at}.sinks"] = (c.heads,)
    return found


def _latent(c: ModelConfig, at: str) -> dict[str, tuple[int, ...]]:
    assert c.latent is not None
    m = c.latent
    query = c.heads * (m.nope_dim + m.rope_dim)
    found: dict[str, tuple[int, ...]] = {
        f"{at}.kv_a_proj_with_mqa.weight": (m.rank + m.rope_dim, c.hidden),
        f"{at}.kv_a_layernorm.weight": (m.rank,),
        f"{at}.kv_b_proj.weight": (c.heads * (m.nope_dim + m.v_dim), m.rank),
        f"{at}.o_proj.weight": (c.hidden, c.heads * m.v_dim),
    }
    if not m.q_rank:
        return found | {f"{at}.q_proj.weight": (query, c.hidden)}
    q_a, q_norm, q_b = (f"{at}.{name}.weight" for name in ("q_a_proj", "q_a_layernorm", "q_b_proj"))
    return found | {q_a: (m.q_rank, c.hidden), q_norm: (m.q_rank,), q_b: (query, m.q_rank)}


def at_random(config: ModelConfig, seed: int = 0, std: float = 0.02) -> Iterator[tuple[str, Tensor]]:
    """Random weights, for load tests and benchmarks where no file is at hand."""
    generator = torch.Generator().manual_seed(seed)
    for name, shape in shapes(config).items():
        if name.endswith("norm.weight"):
            yield name, torch.ones(shape)
        elif name.endswith("bias"):
            yield name, torch.zeros(shape)
        else:
            yield name, torch.empty(shape).normal_(0.0, std, generator=generator)


def parts(tensors: Iterable[tuple[str, Tensor]], config: ModelConfig, ranks: Ranks) -> Iterator[tuple[str, Tensor]]:
    """What a rank holds of whole tensors."""
    for name, tensor in tensors:
        yield name, _part(tensor, ranks.part(name, config))


def _part(tensor: Tensor, part: WeightPart | None) -> Tensor:
    return tensor if part is None else tensor[part.index].contiguous()


def from_folder(
    folder: Path, config: ModelConfig, ranks: Ranks, *, narrow_experts: bool = False
) -> Iterator[tuple[str, Tensor | NarrowWeight]]:
    """What a rank holds of the tensors in a folder's safetensors; the rest is not read, but for narrow ones. `narrow_experts`: those of
    routed experts stay narrow where the rank's part allows it. Raises UsageError that names the file, and what it lacks or has wrong."""
    wanted, files = shapes(config), _files(folder)
    reader = NarrowReader(config, files)
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for stored in file.keys():  # noqa: SIM118 - not a dict
                    name = reader.wide_name(stored)
                    if name in wanted:
                        narrow, slices = reader.narrow(file, stored), file.get_slice(stored)
                        shape = tuple(slices.get_shape()) if narrow is None else wide_shape(narrow)
                        if shape != wanted.pop(name):
                            raise UsageError(f"model file {path}: {name} has shape {shape}, config.json asks for {shapes(config)[name]}")
                        part = ranks.part(name, config)
                        if narrow is not None:
                            own = part_of(narrow, part) if narrow_experts and ".experts." in name else None
                            yield name, _part(widened(narrow), part) if own is None else own
                        else:
                            yield name, file.get_tensor(stored) if part is None else slices[part.index].contiguous()
        except (SafetensorError, OSError) as error:
            raise UsageError(f"model file {path} is not a readable safetensors file: {error}") from None
    if wanted:
        rest = f" and {len(wanted) - 1} more" if len(wanted) > 1 else ""
        raise UsageError(f"model {folder}: its safetensors lack {next(iter(wanted))}{rest}")


def kv_scales(folder: Path) -> list[str]:
    """What a folder's safetensors have of scales by which KV is to be divided before it is rounded."""
    found = list[str]()
    for path in _files(folder) if folder.is_dir() else ():
        with safe_open(path, framework="pt") as file:
            found += [name for name in file.keys() if name.endswith(KV_SCALES)]  # noqa: SIM118 - not a dict
    return found


def _files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError):
            raise UsageError(f"model file {index} has no readable weight_map") from None
        files = [folder / Path(str(name)).name for name in names]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UsageError(f"model {folder} has no *.safetensors; convert its weights first")
    for path in files:
        if not path.is_file():
            raise UsageError(f"model {folder}: {index.name} names {path.name}, which is not there")
    return files
