"""Matrix products with resident weights: dense, or weight-only int8 (a scale an output channel) and int4 (a scale for 32 inputs).

Few rows are bound by reading the weights, so there the packed ones are read as they are; many rows are bound by arithmetic, so there the
weights are widened first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pdlab.core.types import UsageError
from pdlab.kernels.decode import Weight
from pdlab.kernels.linear import (
    Fp8Weight,
    NarrowWeight,
    dequantize_int4,
    dequantize_int8,
    dequantize_narrow,
    matvec,
    matvec_int4,
    matvec_int8,
    quantize_int4,
    quantize_int8,
)

FEW = 8  # rows that one pass of a kernel takes
PIECES = 4  # passes over packed weights that cost less than widening them


@cache
def bfloat16_products() -> bool:
    """Has this CPU products of bfloat16? AVX2 alone has none: oneDNN refuses to order such weights, and torch's own loops take four times
    as long as float32."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """torch's, of many rows; widened to float32 where the CPU has no bfloat16."""
    if x.dtype == torch.bfloat16 and x.device.type == "cpu" and not bfloat16_products():
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)
    return F.linear(x, weight, bias)


class Linear(Protocol):
    """x [tokens, in] -> [tokens, out]."""

    def __call__(self, x: Tensor) -> Tensor: ...

    @property
    def weight(self) -> Weight: ...
    @property
    def bias(self) -> Tensor | None: ...
    @property
    def weight_bytes(self) -> int:
        """Read from memory by each product."""


Most = Callable[[Tensor], Tensor]  # of what each rank has, the largest


class Make(Protocol):
    """`weight` [out, in], `bias` [out]. `most`: where ranks hold columns of a weight, the largest of what they have of a row."""

    def __call__(self, weight: Tensor, bias: Tensor | None, most: Most | None = None) -> Linear: ...


class Dense:
    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        self.weight_bytes = weight.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        if len(x) <= FEW and x.device.type == "cpu":
            few: Tensor = matvec(x, self.weight, self.bias)
            return few
        return product(x, self.weight, self.bias)


class Packed(Dense):
    """On a CPU: the weight as it is for one or two rows, which our kernel reads straight on, and as oneDNN orders it for more. Twice the
    memory for 1.3 to 1.8 times the speed of torch's own product (docs/lab-notes/benchmarks.md)."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        with torch.no_grad():
            self.ordered = torch.ops.mkldnn._reorder_linear_weight(weight, 32)

    def __call__(self, x: Tensor) -> Tensor:
        if len(x) <= 2:
            return super().__call__(x)
        many: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.ordered, self.bias, "none", [], "")
        return many


class Int8:
    def __init__(self, weight: Tensor, bias: Tensor | None, most: Most | None = None) -> None:
        largest = most(weight.float().abs().amax(1)) if most is not None else None
        self.weight, self.bias, self.dtype = quantize_int8(weight, largest), bias, weight.dtype
        self.weight_bytes = self.weight.values.nbytes + self.weight.scale.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        if len(x) <= FEW * PIECES:
            return _in_pieces(x, lambda part: matvec_int8(part, self.weight, self.bias))
        return product(x, dequantize_int8(self.weight).to(self.dtype), self.bias)


class Int4:
    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias, self.dtype = quantize_int4(weight, 32), bias, weight.dtype
        self.weight_bytes = self.weight.packed.nbytes + self.weight.scale.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        if len(x) <= FEW * PIECES:
            return _in_pieces(x, lambda part: matvec_int4(part, self.weight, self.bias))
        return product(x, dequantize_int4(self.weight).to(self.dtype), self.bias)


class Narrow:
    """FP8 or MXFP4 as a file has it, widened for each product."""

    def __init__(self, weight: NarrowWeight, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.weight, self.bias, self.dtype = weight, bias, dtype
        stored = weight.values if isinstance(weight, Fp8Weight) else weight.packed
        self.weight_bytes = stored.nbytes + weight.scale.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        return product(x, dequantize_narrow(self.weight).to(self.dtype), self.bias)


def _in_pieces(x: Tensor, few: Callable[[Tensor], Tensor]) -> Tensor:
    return few(x) if len(x) <= FEW else torch.cat([few(part) for part in torch.split(x, FEW)])


def dense(weight: Tensor, bias: Tensor | None, most: Most | None = None) -> Linear:
    return Dense(weight, bias)


def packed(weight: Tensor, bias: Tensor | None, most: Most | None = None) -> Linear:
    return Packed(weight, bias)


def maker(quantization: str, *, pack: bool = False) -> Make:
    """How each layer's weights are kept: "" as they are (`pack`: and once more, as oneDNN orders them), wint8, wint4. Raises UsageError on
    another name."""
    if not quantization:
        return packed if pack else dense
    if quantization == "wint8":
        return Int8
    if quantization == "wint4":
        return _int4
    raise UsageError(f"--quantization {quantization} is not one of wint8, wint4")


def _int4(weight: Tensor, bias: Tensor | None, most: Most | None = None) -> Linear:
    """Rows that groups of 32 do not fill stay in 8 bits."""
    return Int4(weight, bias) if weight.shape[1] % 32 == 0 else Int8(weight, bias, most)
