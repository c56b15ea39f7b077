"""The small steps of a layer in Triton, for CUDA: one launch and one pass over memory each. A CUDA graph may capture them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST = 16384  # numbers of a row that a program keeps


@triton.jit
def _rms_norm(x, weight, residual, out, x_row, residual_row, dim, eps, RESIDUAL: tl.constexpr, D: tl.constexpr):
    row, d = tl.program_id(0).to(tl.int64), tl.arange(0, D)
    there = d < dim
    wide = tl.load(x + row * x_row + d, mask=there, other=0.0).to(tl.float32)
    if RESIDUAL:
        at = residual + row * residual_row + d
        total = (wide + tl.load(at, mask=there, other=0.0).to(tl.float32)).to(out.dtype.element_ty)
        tl.store(at, total, mask=there)
        wide = total.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / dim + eps)
    by = tl.load(weight + d, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row * dim + d, (wide * scale * by).to(out.dtype.element_ty), mask=there)


@triton.jit
def _silu_and_mul(gate_up, out, width, gate_up_row, CHUNK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    there = at < width
    gate = tl.load(gate_up + row * gate_up_row + at, mask=there, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * gate_up_row + width + at, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row * width + at, (gate / (1.0 + tl.exp(-gate)) * up).to(out.dtype.element_ty), mask=there)


@triton.jit
def _rope(
    q,
    k,
    positions,
    cos,
    sin,
    heads,
    q_token,
    q_head,
    k_token,
    k_head,
    H: tl.constexpr,
    HALF: tl.constexpr,
    D: tl.constexpr,
    K: tl.constexpr,
):
    """A token's heads, H at a time: those of q, then the K of k."""
    token = tl.program_id(0).to(tl.int64)
    head, d = tl.program_id(1) * H + tl.arange(0, H), tl.arange(0, D)
    position = tl.load(positions + token)
    c = tl.load(cos + position * HALF + d, mask=d < HALF, other=0.0)[None, :]
    s = tl.load(sin + position * HALF + d, mask=d < HALF, other=0.0)[None, :]
    for which in tl.static_range(2):
        base, row = (q + token * q_token, q_head) if which == 0 else (k + token * k_token, k_head)
        real = (head < heads if which == 0 else head < K)[:, None] & (d < HALF)[None, :]
        at = base + (head * row)[:, None] + d[None, :]
        a, b = tl.load(at, mask=real, other=0.0).to(tl.float32), tl.load(at + HALF, mask=real, other=0.0).to(tl.float32)
        tl.store(at, (a * c - b * s).to(q.dtype.element_ty), mask=real)
        tl.store(at + HALF, (b * c + a * s).to(q.dtype.element_ty), mask=real)


def takes(x: Tensor) -> bool:
    """Is its row one that a program can keep?"""
    return x.shape[-1] <= MOST and x.stride(-1) == 1


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """As `pdlab.kernels.fused.rms_norm`."""
    rows, dim = x.shape
    out = torch.empty((rows, dim), dtype=x.dtype, device=x.device)
    if rows:
        beside = x if residual is None else residual
        assert x.stride(1) == beside.stride(1) == 1
        padded = triton.next_power_of_2(dim)
        _rms_norm[(rows,)](
            x,
            weight,
            beside,
            out,
            x.stride(0),
            beside.stride(0),
            dim,
            eps,
            RESIDUAL=residual is not None,
            D=padded,
            num_warps=min(16, max(1, padded // 512)),
        )
    return out


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """As `pdlab.kernels.fused.silu_and_mul`."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((rows, width), dtype=gate_up.dtype, device=gate_up.device)
    if rows:
        assert gate_up.stride(1) == 1
        _silu_and_mul[rows, triton.cdiv(width, 1024)](gate_up, out, width, gate_up.stride(0), CHUNK=1024, num_warps=4)
    return out


def rope(q: Tensor, k: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> None:
    """As `pdlab.kernels.fused.rope`."""
    tokens, heads, dim = q.shape
    if not tokens:
        return
    assert q.stride(2) == k.stride(2) == 1 and cos.is_contiguous() and sin.is_contiguous()
    most = max(heads, k.shape[1])
    together = min(16, triton.next_power_of_2(most))
    _rope[tokens, triton.cdiv(most, together)](
        q,
        k,
        positions,
        cos,
        sin,
        heads,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        H=together,
        HALF=dim // 2,
        D=triton.next_power_of_2(dim // 2),
        K=k.shape[1],
        num_warps=4,
    )
