"""The compiled CPU kernel of routed experts."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import CDLL, c_float, c_int, c_int64, c_void_p, cast
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from pdlab.kernels.cpu_build import library
from pdlab.kernels.decode.cpu import LinearStruct, linear_struct
from pdlab.kernels.experts.reference import Activation, ExpertWeights
from pdlab.kernels.linear import Fp8Weight, Int4Weight, Int8Weight, Mxfp4Weight
from pdlab.kernels.linear import cpu as linear


@cache
def _library() -> CDLL | None:
    lib = library("experts", Path(__file__).with_name("cpu.cpp"))
    if lib is not None:
        lib.pdlab_experts.argtypes = [c_void_p, c_int, *[c_void_p] * 6, *[c_int64] * 6, *[c_float] * 3, c_int]
        lib.pdlab_experts.restype = None
    return lib


def available(experts: Sequence[ExpertWeights]) -> bool:
    """Are their weights on a CPU, and is there a compiler?"""
    weights = [weight for weight, _ in experts[0]]
    if any(isinstance(weight, Fp8Weight | Mxfp4Weight) for weight in weights):
        return False
    first = weights[0]
    stored = first.values if isinstance(first, Int8Weight) else first.packed if isinstance(first, Int4Weight) else first
    assert isinstance(stored, Tensor)
    known = stored.dtype in (torch.float32, torch.bfloat16, torch.int8, torch.uint8)
    return known and stored.device.type == "cpu" and linear._library() is not None and _library() is not None


class ExpertTable:
    """Where the experts' weights lie."""

    def __init__(self, experts: Sequence[ExpertWeights]) -> None:
        self.kept = experts
        self.gate_up = (LinearStruct * len(experts))(*(linear_struct(*gate_up) for gate_up, _ in experts))
        self.down = (LinearStruct * len(experts))(*(linear_struct(*down) for _, down in experts))
        self.count = len(experts)


def experts(x: Tensor, ids: Tensor, weights: Tensor, table: ExpertTable, width: int, activation: Activation) -> Tensor:
    lib, products = _library(), linear._library()
    assert lib is not None and products is not None, "ask available() first"
    assert ids.is_contiguous() and ids.dtype == torch.int64
    assert weights.is_contiguous() and weights.dtype == torch.float32 and weights.shape == ids.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    tokens, hidden = x.shape
    out = torch.empty((tokens, hidden), dtype=x.dtype)
    lib.pdlab_experts(
        cast(products.pdlab_matvec, c_void_p),
        x.dtype == torch.bfloat16,
        table.gate_up,
        table.down,
        x.data_ptr(),
        ids.data_ptr(),
        weights.data_ptr(),
        out.data_ptr(),
        x.stride(0),
        tokens,
        ids.shape[1],
        table.count,
        hidden,
        width,
        activation.alpha,
        activation.limit,
        activation.shift,
        torch.get_num_threads(),
    )
    return out
