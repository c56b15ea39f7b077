"""KV blocks gathered from the cache into one contiguous buffer for a transfer, and scattered from one into the cache.

The cache `kv` is [layers, planes, blocks, kv_heads, block_tokens, head_dim], contiguous; a buffer is [n, layers, planes, kv_heads,
block_tokens, head_dim], so that the first blocks of a longer list are the first bytes. Buffer, cache and ids are on one device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pdlab.kernels.kv_blocks import cpu, reference

if torch.cuda.is_available():
    from pdlab.kernels.kv_blocks import cuda

__all__ = ["gather_blocks", "scatter_blocks"]


def gather_blocks(kv: Tensor, block_ids: Tensor, out: Tensor | None = None, *, layers: tuple[int, int] | None = None) -> Tensor:
    """Blocks `block_ids` (int64 or int32 [n]) of layers first <= l < last (all, unless `layers` = (first, last)), packed:
    [n, last - first, planes, kv_heads, block_tokens, head_dim]; into `out` (contiguous) if given."""
    first, last = layers or (0, kv.shape[0])
    device = kv.device.type
    if device == "cuda" or (device == "cpu" and cpu.available()):
        out = kv.new_empty((block_ids.shape[0], last - first, kv.shape[1], *kv.shape[3:])) if out is None else out
        (cuda if device == "cuda" else cpu).copy_blocks(kv, out, block_ids, (first, last), True)
        return out
    return reference.gather_blocks(kv, block_ids, out, layers=(first, last))


def scatter_blocks(buffer: Tensor, kv: Tensor, block_ids: Tensor, *, layers: tuple[int, int] | None = None) -> None:
    """Writes what `gather_blocks` packed to blocks `block_ids` of `kv`, which must differ from one another."""
    first, last = layers or (0, kv.shape[0])
    device = kv.device.type
    if device == "cuda" or (device == "cpu" and cpu.available()):
        (cuda if device == "cuda" else cpu).copy_blocks(kv, buffer, block_ids, (first, last), False)
    else:
        reference.scatter_blocks(buffer, kv, block_ids, layers=(first, last))
