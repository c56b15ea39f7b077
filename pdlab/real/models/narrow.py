"""Weights stored in 8 or 4 bits: FP8 (e4m3) with a scale for each block of a matrix, as DeepSeek-V3 has them, and MXFP4, as gpt-oss has
its experts. Routed experts may stay as they are; all else is widened while loading."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from pdlab.core.types import UsageError
from pdlab.kernels.linear import Fp8Weight, Mxfp4Weight, NarrowWeight, dequantize_narrow
from pdlab.real.models.config import ModelConfig
from pdlab.real.models.ranks import WeightPart

BLOCKS, SCALES, SCALE_INV = "_blocks", "_scales", "_scale_inv"


def part_of(weight: NarrowWeight, part: WeightPart | None) -> NarrowWeight | None:
    """What a rank holds of a weight; None: it does not begin where a scale's block does."""
    if part is None:
        return weight
    if isinstance(weight, Fp8Weight):
        each, first, last = weight.block[part.dimension], part.first, part.first + part.count
        if first % each:
            return None
        scales = (*[slice(None)] * part.dimension, slice(first // each, -(-last // each)))
        return Fp8Weight(weight.values[part.index].contiguous(), weight.scale[scales].contiguous(), weight.block)
    if part.dimension == 1 and (part.first % 32 or part.count % 32):
        return None
    dimension, per = {0: (0, (1, 1)), 1: (2, (2, 32)), 2: (1, (1, 1))}[part.dimension]  # as it is stored, and weights to an element
    packed, scale = (
        stored.narrow(dimension, part.first // each, part.count // each).contiguous()
        for stored, each in zip((weight.packed, weight.scale), per, strict=True)
    )
    return Mxfp4Weight(packed, scale)


def rows_of(weight: NarrowWeight, index: Tensor) -> NarrowWeight:
    """Those of MXFP4 at `index`."""
    assert isinstance(weight, Mxfp4Weight), "scales of fp8 are for several rows"
    return Mxfp4Weight(weight.packed[index], weight.scale[index])


def stacked(first: NarrowWeight, second: NarrowWeight) -> NarrowWeight | None:
    """The rows of both; None: the first's last scale is for less than a block."""
    if isinstance(first, Fp8Weight) and isinstance(second, Fp8Weight):
        if len(first.values) % first.block[0]:
            return None
        return Fp8Weight(torch.cat((first.values, second.values)), torch.cat((first.scale, second.scale)), first.block)
    assert isinstance(first, Mxfp4Weight) and isinstance(second, Mxfp4Weight), "both in one form"
    return Mxfp4Weight(torch.cat((first.packed, second.packed)), torch.cat((first.scale, second.scale)))


def moved(weight: NarrowWeight, device: torch.device) -> NarrowWeight:
    if isinstance(weight, Fp8Weight):
        return Fp8Weight(weight.values.to(device), weight.scale.to(device), weight.block)
    return Mxfp4Weight(weight.packed.to(device), weight.scale.to(device))


def wide_shape(weight: NarrowWeight) -> tuple[int, ...]:
    """Of [out, in] in FP8, and of [experts, in, out] that are stored as MXFP4 [experts, out, in]."""
    if isinstance(weight, Fp8Weight):
        return tuple(weight.values.shape)
    experts, out, half = weight.packed.shape
    return experts, 2 * half, out


def widened(weight: NarrowWeight) -> Tensor:
    """float32, of its `wide_shape`."""
    wide: Tensor = dequantize_narrow(weight)
    return wide if isinstance(weight, Fp8Weight) else wide.transpose(1, 2)


class NarrowReader:
    """Reads a folder's tensors by the names of wide ones."""

    def __init__(self, config: ModelConfig, files: Iterable[Path]) -> None:
        self.config = config
        self.beside: Mapping[str, Path] = {}
        if config.stored != "wide":
            self.beside = {name: path for path in files for name in _names(path) if name.endswith((SCALES, SCALE_INV))}

    def wide_name(self, name: str) -> str:
        """What `name` is a part of, or itself."""
        return name.removesuffix(BLOCKS) if self.config.stored == "mxfp4" else name

    def narrow(self, file: Any, name: str) -> NarrowWeight | None:
        """`name` of the file, where it is narrow there. Raises UsageError where its scales are missing."""
        if self.config.stored == "mxfp4" and name.endswith(BLOCKS):
            return Mxfp4Weight(file.get_tensor(name).flatten(-2), self._scales(name.removesuffix(BLOCKS) + SCALES, name))
        if self.config.stored == "fp8" and file.get_slice(name).get_dtype() == "F8_E4M3":
            return Fp8Weight(file.get_tensor(name), self._scales(name + SCALE_INV, name).float(), self.config.scale_block)
        return None

    def _scales(self, name: str, of: str) -> Tensor:
        if name not in self.beside:
            raise UsageError(f"model {self.config.name}: its safetensors have {of} and lack {name}")
        with safe_open(self.beside[name], framework="pt") as file:
            found: Tensor = file.get_tensor(name)
            return found


def _names(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return list(file.keys())
