"""Weights stored in 8 or 4 bits, widened while loading: FP8 (e4m3) with a scale for each block of a matrix, as DeepSeek-V3 has them, and
MXFP4, as gpt-oss has its experts. Source of MXFP4: OCP Microscaling Formats 1.0, §5.3.3 (E2M1 values, an E8M0 scale for 32)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from pdlab.core.types import UsageError
from pdlab.real.models.config import ModelConfig

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
BLOCKS, SCALES, SCALE_INV = "_blocks", "_scales", "_scale_inv"


def widen_fp8(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """float32 [out, in] of float8_e4m3fn [out, in] times the scale of each block of so many rows and columns."""
    rows, columns = weight.shape
    each = scale.float().repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return weight.float() * each


def widen_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """float32 [experts, out, in] of blocks uint8 [experts, out, in / 32, 16], the first of two in the low half, and scales uint8
    [experts, out, in / 32], powers of two plus 127."""
    table = torch.tensor(FP4)
    values = torch.stack((table[(blocks & 15).int()], table[(blocks >> 4).int()]), -1).flatten(-2)
    return torch.ldexp(values, scales.int()[..., None] - 127).flatten(-2)


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

    def widened(self, file: Any, name: str) -> Tensor | None:
        """`name` of the file in float32, where it is narrow there; else None. Raises UsageError where its scales are missing."""
        if self.config.stored == "mxfp4" and name.endswith(BLOCKS):
            return widen_mxfp4(file.get_tensor(name), self._scales(name.removesuffix(BLOCKS) + SCALES, name)).transpose(1, 2)
        if self.config.stored == "fp8" and file.get_slice(name).get_dtype() == "F8_E4M3":
            return widen_fp8(file.get_tensor(name), self._scales(name + SCALE_INV, name), self.config.scale_block)
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
