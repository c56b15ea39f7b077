"""Routed experts in Triton, for CUDA, of dense weights. Nothing waits for the device: a CUDA graph may capture the calls.

(token, expert) pairs are sorted by expert, and a program computes a tile of the rows of one expert: for few tokens each chosen expert's
weights are read once, by as many programs as fill the device, and no other's. One kernel makes what lies between the two matrices, one
what comes out; the sum over a token's experts is PyTorch's. Source of the tiling by expert: vLLM's fused_moe.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdlab.kernels.experts.reference import Activation, ExpertWeights

ROWS = 16  # of a tile: pairs of one expert


@triton.jit
def _product(x, at, row, stored, weight, column, inner, INNER: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """[M, N] of the rows `at` of x [.., INNER] and the rows `column` of weight [.., INNER]."""
    k = tl.arange(0, K)
    total = tl.zeros([M, N], tl.float32)
    for start in range(0, INNER, K):
        there = start + k < INNER
        a = tl.load(x + at[:, None] * row + (start + k)[None, :], mask=stored[:, None] & there[None, :], other=0.0)
        b = tl.load(weight + column[:, None] * INNER + (start + k)[None, :], mask=inner[:, None] & there[None, :], other=0.0)
        total += tl.dot(a, tl.trans(b), input_precision="ieee")
    return total


@triton.jit
def _tile(tile_expert, tile_first, ends, EXPERTS: tl.constexpr, M: tl.constexpr):
    """(the expert of this program's tile, its pairs' places, and which are there)."""
    tile = tl.program_id(0)
    expert = tl.load(tile_expert + tile)
    places = tl.load(tile_first + tile) + tl.arange(0, M)
    end = tl.load(ends + tl.minimum(expert, EXPERTS - 1))
    return expert, places, places < end


@triton.jit
def _inner(
    x,
    weights,
    biases,
    pairs,
    tile_expert,
    tile_first,
    ends,
    out,
    x_row,
    alpha,
    limit,
    shift,
    CHOSEN: tl.constexpr,
    EXPERTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    BIASED: tl.constexpr,
    LIMITED: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    expert, places, there = _tile(tile_expert, tile_first, ends, EXPERTS, M)
    if expert >= EXPERTS:
        return
    column = tl.program_id(1) * N + tl.arange(0, N)
    wanted = column < WIDTH
    weight = tl.load(weights + expert).to(tl.pointer_type(x.dtype.element_ty))
    token = tl.load(pairs + places, mask=there, other=0) // CHOSEN
    gate = _product(x, token, x_row, there, weight, column, wanted, HIDDEN, M, N, K)
    up = _product(x, token, x_row, there, weight, column + WIDTH, wanted, HIDDEN, M, N, K)
    if BIASED:
        bias = tl.load(biases + expert).to(tl.pointer_type(x.dtype.element_ty))
        gate += tl.load(bias + column, mask=wanted, other=0.0).to(tl.float32)[None, :]
        up += tl.load(bias + column + WIDTH, mask=wanted, other=0.0).to(tl.float32)[None, :]
    if LIMITED:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
    made = gate / (1.0 + tl.exp(-alpha * gate)) * (up + shift)
    tl.store(
        out + places.to(tl.int64)[:, None] * WIDTH + column[None, :], made.to(x.dtype.element_ty), mask=there[:, None] & wanted[None, :]
    )


@triton.jit
def _outer(
    inner,
    weights,
    biases,
    pairs,
    shares,
    tile_expert,
    tile_first,
    ends,
    out,
    EXPERTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    BIASED: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    expert, places, there = _tile(tile_expert, tile_first, ends, EXPERTS, M)
    if expert >= EXPERTS:
        return
    column = tl.program_id(1) * N + tl.arange(0, N)
    wanted = column < HIDDEN
    weight = tl.load(weights + expert).to(tl.pointer_type(inner.dtype.element_ty))
    made = _product(inner, places.to(tl.int64), WIDTH, there, weight, column, wanted, WIDTH, M, N, K)
    if BIASED:
        bias = tl.load(biases + expert).to(tl.pointer_type(inner.dtype.element_ty))
        made += tl.load(bias + column, mask=wanted, other=0.0).to(tl.float32)[None, :]
    pair = tl.load(pairs + places, mask=there, other=0)
    made *= tl.load(shares + pair, mask=there, other=0.0)[:, None]
    tl.store(out + pair[:, None] * HIDDEN + column[None, :], made, mask=there[:, None] & wanted[None, :])


def available(experts: Sequence[ExpertWeights]) -> bool:
    """Are their weights dense, contiguous, and on a GPU?"""
    stored = [part for pair in experts for weight, bias in pair for part in (weight, bias) if part is not None]
    return (
        all(isinstance(part, Tensor) and part.is_cuda and part.is_contiguous() for part in stored) and len({p.dtype for p in stored}) == 1
    )


class ExpertPointers:
    """Where the experts' weights and biases lie, on their device."""

    def __init__(self, experts: Sequence[ExpertWeights]) -> None:
        self.kept = experts
        weight = experts[0][0][0]
        assert isinstance(weight, Tensor), "dense"
        self.dtype, self.count = weight.dtype, len(experts)
        self.biased = tuple(bias is not None for _, bias in experts[0])

        def pointers(part: int, of: int) -> Tensor:
            found = [pair[part][of] for pair in experts]
            return torch.tensor([0 if one is None else one.data_ptr() for one in found], dtype=torch.int64, device=weight.device)  # type: ignore[union-attr]

        self.gate_up, self.gate_up_bias, self.down, self.down_bias = pointers(0, 0), pointers(0, 1), pointers(1, 0), pointers(1, 1)


def experts(x: Tensor, ids: Tensor, weights: Tensor, table: ExpertPointers, width: int, activation: Activation) -> Tensor:
    """As `pdlab.kernels.experts.GroupedExperts`."""
    (tokens, hidden), chosen, count = x.shape, ids.shape[1], table.count
    x = x if x.stride(1) == 1 else x.contiguous()
    pairs = tokens * chosen
    of = ids.flatten()
    of = torch.where((of < 0) | (of >= count), count, of)
    order = of.argsort(stable=True)
    each = torch.zeros(count + 1, dtype=torch.int64, device=x.device).scatter_add_(0, of, torch.ones_like(of))[:count]
    ends = each.cumsum(0)
    tiles_until = ((each + ROWS - 1) // ROWS).cumsum(0)
    most = min(pairs, triton.cdiv(pairs, ROWS) + count)
    tile = torch.arange(most, device=x.device)
    expert = torch.searchsorted(tiles_until, tile, right=True)
    known = expert.clamp(max=count - 1)
    before = tiles_until[known] - (each[known] + ROWS - 1) // ROWS
    first = ends[known] - each[known] + (tile - before) * ROWS
    inner = torch.empty((pairs, width), dtype=x.dtype, device=x.device)
    made = torch.zeros((pairs, hidden), dtype=torch.float32, device=x.device)
    sizes = {"EXPERTS": count, "HIDDEN": hidden, "WIDTH": width, "M": ROWS, "N": 32, "K": 64, "num_warps": 4}
    _inner[most, triton.cdiv(width, 32)](
        x,
        table.gate_up,
        table.gate_up_bias,
        order,
        expert,
        first,
        ends,
        inner,
        x.stride(0),
        activation.alpha,
        activation.limit,
        activation.shift,
        CHOSEN=chosen,
        BIASED=table.biased[0],
        LIMITED=activation.limit > 0,
        **sizes,
    )
    shares = weights.flatten().contiguous()
    _outer[most, triton.cdiv(hidden, 32)](
        inner, table.down, table.down_bias, order, shares, expert, first, ends, made, BIASED=table.biased[1], **sizes
    )
    return made.view(tokens, chosen, hidden).sum(1).to(x.dtype)
