"""Routed experts in Triton, for CUDA: two grouped products, of the tokens of each expert with its weights.

A tile is M (token, expert) pairs of one expert by N outputs. How the tiles fall to experts is worked out on the device, and the grid is
as large as it could have to be, so nothing waits for the device and a CUDA graph may capture the calls. A tile of nobody's ends at once.
Quantised weights are read as they are stored, and widened in registers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdlab.kernels.decode.reference import Weight
from pdlab.kernels.experts.reference import Activation, ExpertWeights
from pdlab.kernels.linear import Fp8Weight, Int4Weight, Int8Weight, Mxfp4Weight

TOKENS = 4096  # at once: what lies between the products takes memory
PLAIN, INT8, INT4, FP8, MXFP4 = range(5)


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
def _widened(weight, scale, n, start, wanted, inner, KIND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, K: tl.constexpr, TYPE):
    """The weights [K, N] of outputs `n` (where `wanted`) and inputs from `start` on, as TYPE. A scale is for ROWS outputs by COLUMNS
    inputs; that of int8, for an output, is left to the sums."""
    at_n, at_k = n.to(tl.int64)[None, :], (start + tl.arange(0, K))[:, None]
    inside = wanted[None, :] & (at_k < inner)
    if KIND == 0:
        plain = tl.multiple_of(weight.to(tl.pointer_type(TYPE)), 16)
        values = tl.load(plain + at_n * inner + at_k, mask=inside, other=0.0)
    elif KIND == 1:
        bytes = tl.multiple_of(weight.to(tl.pointer_type(tl.int8)), 16)
        values = tl.load(bytes + at_n * inner + at_k, mask=inside, other=0).to(TYPE)
    else:
        bytes = tl.multiple_of(weight.to(tl.pointer_type(tl.uint8)), 16)
        if COLUMNS % K == 0:  # all these inputs are of one
            scales, scaled = at_n // ROWS * tl.cdiv(inner, COLUMNS) + start // COLUMNS, wanted[None, :]
        else:
            scales, scaled = at_n // ROWS * tl.cdiv(inner, COLUMNS) + at_k // COLUMNS, inside
        if KIND == 3:
            bits = tl.load(bytes + at_n * inner + at_k, mask=inside, other=0)
            by = tl.load(scale.to(tl.pointer_type(tl.float32)) + scales, mask=scaled, other=0.0)
            values = (bits.to(tl.float8e4nv, bitcast=True).to(tl.float32) * by).to(TYPE)
        elif KIND == 2:  # byte b of 16 holds weight b of 32 in its low half, and b + 16 in its high half
            code = tl.load(bytes + at_n * (inner // 2) + (at_k // 32 * 16 + at_k % 16), mask=inside, other=0).to(tl.int32)
            code = code >> (at_k // 16 % 2 * 4) & 15
            by = tl.load(scale.to(tl.pointer_type(tl.float32)) + scales, mask=scaled, other=0.0)
            values = ((code - 8).to(tl.float32) * by).to(TYPE)
        else:  # E2M1: 0, 0.5, 1, 1.5, 2, 3, 4, 6, and the same below 0
            code = tl.load(bytes + at_n * (inner // 2) + at_k // 2, mask=inside, other=0).to(tl.int32) >> (at_k % 2 * 4) & 15
            twice = code & 7
            twice = tl.where(twice < 4, twice, tl.where(twice < 6, twice * 2 - 4, twice * 4 - 16))
            power = tl.load(scale.to(tl.pointer_type(tl.uint8)) + scales, mask=scaled, other=127).to(tl.float32) - 128.0
            values = (tl.where(code > 7, -twice, twice).to(tl.float32) * tl.exp2(power)).to(TYPE)
    return values


@triton.jit
def _products(
    rows,
    real,
    weight,
    scale,
    first,
    second,
    wanted,
    inner,
    PAIR: tl.constexpr,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """Sums float32 [M, N] of the rows with the weights of outputs `first`, and (PAIR) of `second`, both where `wanted`."""
    one, other = tl.zeros([M, N], tl.float32), tl.zeros([M, N], tl.float32)
    k = tl.arange(0, K)
    for start in range(0, inner, K):
        at = start + k
        a = tl.load(rows + at[None, :], mask=real[:, None] & (at < inner)[None, :], other=0.0)
        b = _widened(weight, scale, first, start, wanted, inner, KIND, ROWS, COLUMNS, K, a.dtype)
        one += tl.dot(a, b, input_precision="ieee")
        if PAIR:
            b = _widened(weight, scale, second, start, wanted, inner, KIND, ROWS, COLUMNS, K, a.dtype)
            other += tl.dot(a, b, input_precision="ieee")
    if KIND == 1:
        by = scale.to(tl.pointer_type(tl.float32))
        one *= tl.load(by + first, mask=wanted, other=0.0)[None, :]
        if PAIR:
            other *= tl.load(by + second, mask=wanted, other=0.0)[None, :]
    return one, other


@triton.jit
def _gate_up(
    x,
    weights,
    scales,
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
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    COUNT: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    tile = tl.program_id(0)
    if tile >= tl.load(expert_tiles + experts):
        return
    expert, pair, real = _rows(tile, expert_tiles, first_pairs, order, experts, M, COUNT)
    n = tl.program_id(1) * N + tl.arange(0, N)
    rows = x + (pair // chosen * x_row)[:, None]
    weight, scale = tl.load(weights + expert), tl.load(scales + expert)
    gate, up = _products(rows, real, weight, scale, n, width + n, n < width, hidden, True, KIND, ROWS, COLUMNS, M, N, K)
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
    scales,
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
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    COUNT: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    tile = tl.program_id(0)
    if tile >= tl.load(expert_tiles + experts):
        return
    expert, pair, real = _rows(tile, expert_tiles, first_pairs, order, experts, M, COUNT)
    n = tl.program_id(1) * N + tl.arange(0, N)
    rows = made + (pair.to(tl.int64) * width)[:, None]
    weight, scale = tl.load(weights + expert), tl.load(scales + expert)
    total, _ = _products(rows, real, weight, scale, n, n, n < hidden, width, False, KIND, ROWS, COLUMNS, M, N, K)
    if BIAS:
        bias = tl.load(biases + expert).to(tl.pointer_type(made.dtype.element_ty))
        total += tl.load(bias + n, mask=n < hidden, other=0.0).to(tl.float32)[None, :]
    total = total * tl.load(shares + pair, mask=real, other=0.0)[:, None]
    mask = real[:, None] & (n < hidden)[None, :]
    tl.store(out + pair.to(tl.int64)[:, None] * hidden + n[None, :], total.to(out.dtype.element_ty), mask=mask)


Form = tuple[torch.dtype, int, int, int]  # of a weight's elements, its kind, and outputs and inputs to which a scale belongs


def _parts(weight: Weight) -> tuple[Tensor, Tensor | None, Form] | None:
    """Its elements and its scales, and their form; None: it has none here."""
    match weight:
        case Int8Weight(values, scale):
            return values, scale, (values.dtype, INT8, 1, 1)
        case Int4Weight(packed, scale, None, group):
            return packed, scale, (packed.dtype, INT4, 1, group)
        case Fp8Weight(values, scale, (rows, columns)):
            return values, scale, (values.dtype, FP8, rows, columns)
        case Mxfp4Weight(packed, scale):
            return packed, scale, (packed.dtype, MXFP4, 1, 32)
        case Tensor() if weight.dtype in (torch.bfloat16, torch.float16, torch.float32):
            return weight, None, (weight.dtype, PLAIN, 1, 1)
        case _:
            return None


def available(experts: Sequence[ExpertWeights]) -> bool:
    """Are their weights in forms of CUDA that are known here, all gates' and ups' alike and all downs', all with biases or none?"""
    parts = [[(_parts(weight), bias is None) for weight, bias in expert] for expert in experts]
    forms = {
        tuple((found and (found[2], found[0].device.type, found[0].is_contiguous()), none) for found, none in expert) for expert in parts
    }
    return len(forms) == 1 and all(found and found[1:] == ("cuda", True) for found, _ in next(iter(forms)))


class ExpertPointers:
    """Where the experts' weights, scales and biases lie, on the device that they lie on."""

    def __init__(self, experts: Sequence[ExpertWeights]) -> None:
        self.kept = experts
        self.count, self.biased = len(experts), experts[0][0][1] is not None
        table: list[list[list[int]]] = [[], [], []]
        forms, device = [], None
        for which in range(2):
            each = [_parts(expert[which][0]) for expert in experts]
            first = each[0]
            assert first is not None, "ask available() first"
            forms.append(first[2])
            device = first[0].device
            table[0].append([0 if parts is None else parts[0].data_ptr() for parts in each])
            table[1].append([0 if parts is None or parts[1] is None else parts[1].data_ptr() for parts in each])
            table[2].append([0 if (bias := expert[which][1]) is None else bias.data_ptr() for expert in experts])
        self.forms = forms[0], forms[1]
        self.table = torch.tensor(table, dtype=torch.int64, device=device)

    def takes(self, x: Tensor) -> bool:
        """Plain weights are of x's dtype; quantised ones are widened to it."""
        return all(kind != PLAIN or dtype == x.dtype for dtype, kind, _, _ in self.forms)


def experts(x: Tensor, ids: Tensor, weights: Tensor, where: ExpertPointers, width: int, activation: Activation) -> Tensor:
    """As `pdlab.kernels.experts.GroupedExperts`, of any number of tokens."""
    x = x if x.stride(1) == 1 else x.contiguous()
    if len(x) <= TOKENS:
        return _some(x, ids, weights, where, width, activation)
    parts = zip(x.split(TOKENS), ids.split(TOKENS), weights.split(TOKENS), strict=True)
    return torch.cat([_some(*part, where, width, activation) for part in parts])


def _some(x: Tensor, ids: Tensor, weights: Tensor, where: ExpertPointers, width: int, activation: Activation) -> Tensor:
    assert where.takes(x)
    (tokens, hidden), chosen, count = x.shape, ids.shape[1], where.count
    pairs, wide = tokens * chosen, x.element_size() == 4
    narrow = any(kind != PLAIN for _, kind, _, _ in where.forms)
    m = 16 if pairs <= 16 * count or (wide and narrow) else 32 if wide else 64  # more would spill registers
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
        "K": 32 if wide or any(columns == 32 for _, _, _, columns in where.forms) else 64,  # one scale an output, if it can be
        "num_warps": 8 if m == 64 else 4,
        "num_stages": 3,
    }
    forms = [{"KIND": kind, "ROWS": rows, "COLUMNS": columns} for _, kind, rows, columns in where.forms]
    (gate_up, down), (gate_up_scales, down_scales), (gate_up_biases, down_biases) = where.table
    _gate_up[tiles, triton.cdiv(width, sizes["N"])](
        x,
        gate_up,
        gate_up_scales,
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
        **forms[0],
        **sizes,
    )
    _down[tiles, triton.cdiv(hidden, sizes["N"])](
        made,
        down,
        down_scales,
        down_biases,
        weights,
        out,
        order,
        expert_tiles,
        first_pairs,
        count,
        hidden,
        width,
        **forms[1],
        **sizes,
    )
    summed: Tensor = out.view(tokens, chosen, hidden).sum(1, dtype=torch.float32).to(x.dtype)
    return summed
