"""Gathering and scattering KV blocks in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def gather_blocks(kv: Tensor, block_ids: Tensor, out: Tensor | None = None, *, layers: tuple[int, int] | None = None) -> Tensor:
    """As `pdlab.kernels.kv_blocks.gather_blocks`."""
    first, last = layers or (0, kv.shape[0])
    picked = kv[first:last].index_select(2, block_ids).permute(2, 0, 1, 3, 4, 5)
    if out is None:
        return picked.contiguous()
    return out.copy_(picked)


def scatter_blocks(buffer: Tensor, kv: Tensor, block_ids: Tensor, *, layers: tuple[int, int] | None = None) -> None:
    """As `pdlab.kernels.kv_blocks.scatter_blocks`."""
    first, last = layers or (0, kv.shape[0])
    kv[first:last].index_copy_(2, block_ids.to(torch.int64), buffer.permute(1, 2, 0, 3, 4, 5))
