"""Products of at most 8 vectors with a weight, as decode needs them; the weight is read once, as it is stored.

It is float32, bfloat16, int8 or int4. Compiled on CPUs. More vectors than 8, and other devices, take PyTorch's matrix product, for
which a quantised weight is first dequantised.
"""

from __future__ import annotations

from torch import Tensor

from pdlab.kernels.linear import cpu, reference
from pdlab.kernels.linear.reference import (
    Fp8Weight,
    Int4Weight,
    Int8Weight,
    Mxfp4Weight,
    NarrowWeight,
    dequantize_fp8,
    dequantize_int4,
    dequantize_int8,
    dequantize_mxfp4,
    dequantize_narrow,
    quantize_int4,
    quantize_int8,
)

__all__ = [
    "Fp8Weight",
    "Int4Weight",
    "Int8Weight",
    "Mxfp4Weight",
    "NarrowWeight",
    "dequantize_fp8",
    "dequantize_int4",
    "dequantize_int8",
    "dequantize_mxfp4",
    "dequantize_narrow",
    "matvec",
    "matvec_int4",
    "matvec_int8",
    "quantize_int4",
    "quantize_int8",
]


def matvec(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [n, in] times weight [out, in] transposed, plus bias [out]: [n, out] of x's dtype. Each float32 or bfloat16."""
    if cpu.available(x, weight):
        return cpu.product(x, weight, cpu.FLOAT if weight.element_size() == 4 else cpu.BF16, bias)
    return reference.matvec(x, weight, bias)


def matvec_int8(x: Tensor, weight: Int8Weight, bias: Tensor | None = None) -> Tensor:
    """As `matvec`, with a weight from `quantize_int8`."""
    if cpu.available(x, weight.values):
        return cpu.product(x, weight.values, cpu.INT8, bias, weight.scale)
    return reference.matvec_int8(x, weight, bias)


def matvec_int4(x: Tensor, weight: Int4Weight, bias: Tensor | None = None) -> Tensor:
    """As `matvec`, with a weight from `quantize_int4`."""
    if cpu.available(x, weight.packed):
        return cpu.product(x, weight.packed, cpu.INT4, bias, weight.scale, weight.zero, weight.group)
    return reference.matvec_int4(x, weight, bias)
