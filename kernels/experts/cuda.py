"""Routed experts in Triton, for CUDA: two grouped products, of the tokens of each expert with its weights.

A tile is M (token, expert) pairs of one expert by N outputs. How the tiles fall to experts is worked out on the device, and the grid is
as large as it could have to be, so nothing waits for the device and a CUDA graph may capture the calls. A tile of nobody's ends at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdlab.kernels.experts.reference import Activation, ExpertWeights

TOKENS = 4096  # at once: what lies between the products takes memory


@triton.jit
def _rows(tile, expert_tiles, first_pairs, order, experts, M: tl.constexpr, COUNT: tl.constexpr):
    """(the tile's expert, its pairs [M], which of them are real). `expert_tiles` [experts + 1]: the tiles before each expert's."""
    which = tl.arange(0, COUNT)
    before = tl.load(expert_tiles + which, mask=which <= experts, other=1 << 30)
    expert = tl.sum((before <= tile).to(tl.int32), 0) - 1
    first = tl.load(first_pairs + expert)
    row = first + (tile - tl.load(expert_tiles + expert)) * M + tl.arange(0, M)
    real = row < tl.load(first_pairs + expert + 1)
    return expert, tl.load(order + row, mask=real, other=0), real


@triton.jit
def _gate_up(
    x,
    weights,
    biases,
    made,
    order,
    expert_tiles,
    first_pairs,
    experts,
    chosen,
    hidden,
    width,
    x_row,
    alpha,
    limit,
    shift,
    LIMIT: tl.constexpr,
    BIAS: tl.constexpr,
    COUNT: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    tile = tl.program_id(0)
    if tile >= tl.load(expert_tiles + experts):
        return
    expert, pair, real = _rows(tile, expert_tiles, first_pairs, order, experts, M, COUNT)
    weight = tl.multiple_of(tl.load(weights + expert).to(tl.pointer_type(x.dtype.element_ty)), 16)
    n, k = tl.program_id(1) * N + tl.arange(0, N), tl.arange(0, K)
    gate, up = tl.zeros([M, N], tl.float32), tl.zeros([M, N], tl.float32)
    rows = x + (pair // chosen * x_row)[:, None]
    columns = weight + n.to(tl.int64)[None, :] * hidden
    for start in range(0, hidden, K):
        at = start + k
        a = tl.load(rows + at[None, :], mask=real[:, None] & (at < hidden)[None, :], other=0.0)
        inside = (n < width)[None, :] & (at < hidden)[:, None]
        gate += tl.dot(a, tl.load(columns + at[:, None], mask=inside, other=0.0), input_precision="ieee")
        up += tl.dot(a, tl.load(columns + width.to(tl.int64) * hidden + at[:, None], mask=inside, other=0.0), input_precision="ieee")
    if BIAS:
        bias = tl.load(biases + expert).to(tl.pointer_type(x.dtype.element_ty))
        gate += tl.load(bias + n, mask=n < width, other=0.0).to(tl.float32)[None, :]
        up += tl.load(bias + width + n, mask=n < width, other=0.0).to(tl.float32)[None, :]
    if LIMIT:
        gate = tl.minimum(gate, limit)
        up = tl.maximum(tl.minimum(up, limit), -limit)
    active = gate / (1.0 + tl.exp(-alpha * gate)) * (up + shift)
    mask = real[:, None] & (n < width)[None, :]
    tl.store(made + pair.to(tl.int64)[:, None] * width + n[None, :], active.to(made.dtype.element_ty), mask=mask)


@triton.jit
def _down(
    made,
    weights,
    biases,
    shares,
    out,
    order,
    expert_tiles,
    first_pairs,
    experts,
    hidden,
    width,
    BIAS: tl.constexpr,
    COUNT: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    tile = tl.program_id(0)
    if tile >= tl.load(expert_tiles + experts):
        return
    expert, pair, real = _rows(tile, expert_tiles, first_pairs, order, experts, M, COUNT)
    weight = tl.multiple_of(tl.load(weights + expert).to(tl.pointer_type(made.dtype.element_ty)), 16)
    n, k = tl.program_id(1) * N + tl.arange(0, N), tl.arange(0, K)
    total = tl.zeros([M, N], tl.float32)
    rows = made + (pair.to(tl.int64) * width)[:, None]
    columns = weight + n.to(tl.int64)[None, :] * width
    for start in range(0, width, K):
        at = start + k
        a = tl.load(rows + at[None, :], mask=real[:, None] & (at < width)[None, :], other=0.0)
        b = tl.load(columns + at[:, None], mask=(n < hidden)[None, :] & (at < width)[:, None], other=0.0)
        total += tl.dot(a, b, input_precision="ieee")
    if BIAS:
        bias = tl.load(biases + expert).to(tl.pointer_type(made.dtype.element_ty))
        total += tl.load(bias + n, mask=n < hidden, other=0.0).to(tl.float32)[None, :]
    total = total * tl.load(shares + pair, mask=real, other=0.0)[:, None]
    mask = real[:, None] & (n < hidden)[None, :]
    tl.store(out + pair.to(tl.int64)[:, None] * hidden + n[None, :], total.to(out.dtype.element_ty), mask=mask)


def available(experts: Sequence[ExpertWeights]) -> bool:
    """Are their weights plain ones of a CUDA device, all with biases or none?"""
    parts = [part for expert in experts for part in expert]
    kinds = {(w.dtype, w.device.type, w.is_contiguous()) if isinstance(w, Tensor) else None for w, _ in parts}
    return kinds <= {(dtype, "cuda", True) for dtype in (torch.bfloat16, torch.float16, torch.float32)} and (
        len(kinds) == 1 and len({bias is None for _, bias in parts}) == 1
    )


class ExpertPointers:
    """Where the experts' weights and biases lie, on the device that they lie on."""

    def __init__(self, experts: Sequence[ExpertWeights]) -> None:
        self.kept = experts
        first = experts[0][0][0]
        assert isinstance(first, Tensor)
        self.dtype, self.count, self.biased = first.dtype, len(experts), experts[0][0][1] is not None
        matrices = [[part[which][0].data_ptr() for part in experts] for which in range(2)]  # type: ignore[union-attr]
        biases = [[0 if (bias := part[which][1]) is None else bias.data_ptr() for part in experts] for which in range(2)]
        self.table = torch.tensor([matrices, biases], dtype=torch.int64, device=first.device)


def experts(x: Tensor, ids: Tensor, weights: Tensor, where: ExpertPointers, width: int, activation: Activation) -> Tensor:
    """As `pdlab.kernels.experts.GroupedExperts`, of any number of tokens."""
    x = x if x.stride(1) == 1 else x.contiguous()
    if len(x) <= TOKENS:
        return _some(x, ids, weights, where, width, activation)
    parts = zip(x.split(TOKENS), ids.split(TOKENS), weights.split(TOKENS), strict=True)
    return torch.cat([_some(*part, where, width, activation) for part in parts])


def _some(x: Tensor, ids: Tensor, weights: Tensor, where: ExpertPointers, width: int, activation: Activation) -> Tensor:
    assert x.dtype == where.dtype
    (tokens, hidden), chosen, count = x.shape, ids.shape[1], where.count
    pairs, wide = tokens * chosen, x.element_size() == 4
    m = 16 if pairs <= 16 * count else 32 if wide else 64
    flat = ids.flatten()
    flat = flat.masked_fill((flat < 0) | (flat > count), count)  # of no expert here: sorted last, in nobody's tile
    order = flat.argsort(stable=True)
    counts = torch.zeros(count + 1, dtype=torch.int64, device=x.device).scatter_add_(0, flat, torch.ones_like(flat))[:count]
    first_pairs, expert_tiles = torch.zeros((2, count + 1), dtype=torch.int64, device=x.device)
    torch.cumsum(counts, 0, out=first_pairs[1:])
    torch.cumsum((counts + m - 1) // m, 0, out=expert_tiles[1:])
    tiles = min(pairs, pairs // m + count)
    made = torch.empty((pairs, width), dtype=x.dtype, device=x.device)
    out = torch.zeros((pairs, hidden), dtype=x.dtype, device=x.device)
    sizes = {
        "BIAS": where.biased,
        "COUNT": triton.next_power_of_2(count + 1),
        "M": m,
        "N": 32 if wide else 64 if m == 16 else 128,
        "K": 32 if wide else 64,
        "num_warps": 8 if m == 64 else 4,
        "num_stages": 3,
    }
    (gate_up, down), (gate_up_biases, down_biases) = where.table
    _gate_up[tiles, triton.cdiv(width, sizes["N"])](
        x,
        gate_up,
        gate_up_biases,
        made,
        order,
        expert_tiles,
        first_pairs,
        count,
        chosen,
        hidden,
        width,
        x.stride(0),
        activation.alpha,
        activation.limit,
        activation.shift,
        LIMIT=activation.limit > 0,
        **sizes,
    )
    _down[tiles, triton.cdiv(hidden, sizes["N"])](
        made, down, down_biases, weights, out, order, expert_tiles, first_pairs, count, hidden, width, **sizes
    )
    summed: Tensor = out.view(tokens, chosen, hidden).sum(1, dtype=torch.float32).to(x.dtype)
    return summed
