"""Copies of KV blocks in Triton, for CUDA, eight bytes an element whatever the dtype."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 2048  # elements a program copies


@triton.jit
def _copy(kv, buffer, ids, blocks, piece, INTO_BUFFER: tl.constexpr, CHUNK: tl.constexpr):
    """One chunk of a piece: kv is [planes, blocks, piece], buffer [n, planes, piece], in elements of 8 bytes."""
    i, plane = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    stored = kv + (plane * blocks + tl.load(ids + i).to(tl.int64)) * piece + at
    packed = buffer + (i * tl.num_programs(1) + plane) * piece + at
    if INTO_BUFFER:
        tl.store(packed, tl.load(stored, mask=at < piece), mask=at < piece)
    else:
        tl.store(stored, tl.load(packed, mask=at < piece), mask=at < piece)


def copy_blocks(kv: Tensor, buffer: Tensor, block_ids: Tensor, layers: tuple[int, int], into_buffer: bool) -> None:
    first, last = layers
    assert kv.is_contiguous() and buffer.is_contiguous() and buffer.dtype == kv.dtype
    assert buffer.shape == (block_ids.shape[0], last - first, *kv.shape[1:2], *kv.shape[3:])
    planes = kv.shape[1] * (last - first)
    piece = kv.shape[3] * kv.shape[4] * kv.shape[5] * kv.element_size() // 8
    wide = torch.int64
    for begin in range(0, len(block_ids), 65535):  # a grid's third side
        some = block_ids[begin : begin + 65535]
        _copy[triton.cdiv(piece, CHUNK), planes, len(some)](
            kv[first:last].view(wide),
            buffer[begin : begin + 65535].view(wide),
            some,
            kv.shape[2],
            piece,
            INTO_BUFFER=into_buffer,
            CHUNK=CHUNK,
            num_warps=4,
        )
