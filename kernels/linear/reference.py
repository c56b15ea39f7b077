"""Products of vectors with plain and quantised weights in plain PyTorch, and how the weights are quantised.

int8: w = values * scale, one scale an output channel. int4: w = (code - zero) * scale, codes 0..15, one scale (and zero, else 8) for
`group` weights along the input. Of every 32 weights of a row, byte b of 16 holds number b in its low half and number b + 16 in its
high half: 16 bytes widen to two whole vectors.

fp8 and mxfp4 are forms of files: w = e4m3 * scale, one scale a block of a matrix, as DeepSeek-V3 has them, and w = E2M1 * 2^(scale - 127),
one scale for 32 weights along the input, the first of two weights in the low half of a byte, as gpt-oss has its experts. Source of the
latter: OCP Microscaling Formats 1.0, §5.3.3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Int8Weight:
    values: Tensor  # int8 [out, in]
    scale: Tensor  # float32 [out]


@dataclass(frozen=True, slots=True, eq=False)
class Int4Weight:
    packed: Tensor  # uint8 [out, in / 2]
    scale: Tensor  # float32 [out, in / group]
    zero: Tensor | None  # float32 [out, in / group], or None: 8
    group: int


@dataclass(frozen=True, slots=True, eq=False)
class Fp8Weight:
    values: Tensor  # float8_e4m3fn [out, in]
    scale: Tensor  # float32 [out / rows, in / columns], rounded up
    block: tuple[int, int]  # rows and columns to which a scale belongs


@dataclass(frozen=True, slots=True, eq=False)
class Mxfp4Weight:
    packed: Tensor  # uint8 [out, in / 2]
    scale: Tensor  # uint8 [out, in / 32]


NarrowWeight = Fp8Weight | Mxfp4Weight
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def quantize_int8(weight: Tensor, largest: Tensor | None = None) -> Int8Weight:
    """[out, in] to int8 with a scale for each output channel, which maps its largest weight to 127; `largest` float32 [out]: where these
    are some columns of a weight, that of all of them."""
    wide = weight.float()
    scale = (wide.abs().amax(1) if largest is None else largest).clamp(min=1e-30) / 127
    return Int8Weight((wide / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale)


def quantize_int4(weight: Tensor, group: int = 32, *, zeros: bool = False) -> Int4Weight:
    """[out, in] to 4 bits in groups along `in`, a multiple of `group`, itself one of 32.

    Without `zeros`, code 8 is 0 and the scale (which may be negative) maps the group's largest weight in size to code 0; with them, the
    group's least weight is code 0 and its largest 15.
    """
    assert group % 32 == 0 and weight.shape[1] % group == 0, "groups are of 32, 64, 96, ... weights and fill the rows"
    wide = weight.float().unflatten(1, (-1, group))
    if zeros:
        low, high = wide.aminmax(dim=-1)
        scale = (high - low).clamp(min=1e-30) / 15
        zero = -low / scale
    else:
        extreme = wide.gather(-1, wide.abs().argmax(-1, keepdim=True)).squeeze(-1)
        scale = extreme / -8
        scale = torch.where(scale == 0, 1e-30, scale)
        zero = torch.full_like(scale, 8)
    codes = (wide / scale[..., None] + zero[..., None]).round().clamp(0, 15).to(torch.uint8)
    low_half, high_half = codes.reshape(len(weight), -1, 2, 16).unbind(2)
    return Int4Weight((low_half | high_half << 4).flatten(1), scale.contiguous(), zero.contiguous() if zeros else None, group)


def dequantize_int8(weight: Int8Weight) -> Tensor:
    """float32 [out, in]."""
    return weight.values.float() * weight.scale[:, None]


def dequantize_int4(weight: Int4Weight) -> Tensor:
    """float32 [out, in]."""
    halves = weight.packed.unflatten(1, (-1, 16))
    codes = torch.stack((halves & 15, halves >> 4), 2).reshape(len(halves), -1, weight.group).float()
    zero = 8.0 if weight.zero is None else weight.zero[..., None]
    return ((codes - zero) * weight.scale[..., None]).flatten(1)


def dequantize_fp8(weight: Fp8Weight) -> Tensor:
    """float32 [out, in]."""
    (rows, columns), (block_rows, block_columns) = weight.values.shape, weight.block
    each = weight.scale.float().repeat_interleave(block_rows, 0)[:rows].repeat_interleave(block_columns, 1)[:, :columns]
    return weight.values.float() * each


def dequantize_mxfp4(weight: Mxfp4Weight) -> Tensor:
    """float32 [..., out, in], of any number of matrices."""
    table = torch.tensor(FP4, device=weight.packed.device)
    values = torch.stack((table[(weight.packed & 15).int()], table[(weight.packed >> 4).int()]), -1).flatten(-2)
    return torch.ldexp(values.unflatten(-1, (-1, 32)), weight.scale.int()[..., None] - 127).flatten(-2)


def dequantize_narrow(weight: NarrowWeight) -> Tensor:
    """float32 [out, in]."""
    return dequantize_fp8(weight) if isinstance(weight, Fp8Weight) else dequantize_mxfp4(weight)


def matvec(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `pdlab.kernels.linear.matvec`."""
    if x.dtype == weight.dtype:
        return torch.nn.functional.linear(x, weight, bias)
    return torch.nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


def matvec_int8(x: Tensor, weight: Int8Weight, bias: Tensor | None = None) -> Tensor:
    """As `pdlab.kernels.linear.matvec_int8`."""
    return matvec(x, dequantize_int8(weight), bias)


def matvec_int4(x: Tensor, weight: Int4Weight, bias: Tensor | None = None) -> Tensor:
    """As `pdlab.kernels.linear.matvec_int4`."""
    return matvec(x, dequantize_int4(weight), bias)
