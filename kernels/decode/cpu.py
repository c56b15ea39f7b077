"""Lays a model's layers out as the compiled decode step wants them, and calls it."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import CDLL, Structure, byref, c_double, c_int, c_int64, c_void_p, cast
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from pdlab.kernels.all_reduce import SharedSum
from pdlab.kernels.cpu_build import library
from pdlab.kernels.fused import cpu as fused
from pdlab.kernels.linear import Int4Weight, Int8Weight
from pdlab.kernels.linear import cpu as linear
from pdlab.kernels.paged_attention import cpu as attention

Weight = Tensor | Int8Weight | Int4Weight


class _Functions(Structure):
    _fields_ = [(name, c_void_p) for name in ("matvec", "rms_norm", "silu_and_mul", "rope", "store_kv", "attention", "all_reduce")]


class LinearStruct(Structure):
    _fields_ = [(name, c_void_p) for name in ("weight", "scale", "zero", "bias")] + [
        (name, c_int64) for name in ("kind", "inputs", "out", "group")
    ]


class _Layer(Structure):
    _fields_ = [
        *[(name, LinearStruct) for name in ("qkv", "out", "gate_up", "down")],
        *[(name, c_void_p) for name in ("input_norm", "post_norm", "q_norm", "k_norm", "k_cache", "v_cache")],
        ("window", c_int64),
    ]


class _Shape(Structure):
    _fields_ = [
        *[
            (name, c_int64)
            for name in (
                "is_bf16",
                "stored",
                "layers",
                "tokens",
                "sequences",
                "hidden",
                "heads",
                "kv_heads",
                "dim",
                "ffn",
                "block_tokens",
                "table_stride",
            )
        ],
        ("eps", c_double),
        ("scale", c_double),
    ]


class _Step(Structure):
    _fields_ = [(name, c_void_p) for name in ("positions", "slots", "tables", "starts", "contexts", "cos", "sin")]


@cache
def _library() -> CDLL | None:
    lib = library("decode", Path(__file__).with_name("cpu.cpp"))
    if lib is not None:
        lib.pdlab_decode.argtypes = [*[c_void_p] * 9, c_int]
        lib.pdlab_decode.restype = c_int
    return lib


def available(dtype: torch.dtype) -> bool:
    libraries = (_library, linear._library, fused._library, attention._functions)
    return dtype in (torch.float32, torch.bfloat16) and all(found() is not None for found in libraries)


def linear_struct(weight: Weight, bias: Tensor | None) -> LinearStruct:
    at = 0 if bias is None else bias.data_ptr()
    if isinstance(weight, Int8Weight):
        out, inputs = weight.values.shape
        return LinearStruct(weight.values.data_ptr(), weight.scale.data_ptr(), 0, at, linear.INT8, inputs, out, 0)
    if isinstance(weight, Int4Weight):
        out, halves = weight.packed.shape
        zero = 0 if weight.zero is None else weight.zero.data_ptr()
        return LinearStruct(weight.packed.data_ptr(), weight.scale.data_ptr(), zero, at, linear.INT4, 2 * halves, out, weight.group)
    out, inputs = weight.shape
    return LinearStruct(weight.data_ptr(), 0, 0, at, linear.FLOAT if weight.dtype == torch.float32 else linear.BF16, inputs, out, 0)


class DecodeStep:
    """Of a model with these layers, over these caches, which both have to stay where they are. `sum`: over the ranks, where each has but
    a part of the heads and of the feed-forward, and these sizes are of its part."""

    def __init__(
        self,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        hidden: int,
        ffn: int,
        eps: float,
        dtype: torch.dtype,
        sum: SharedSum | None = None,
    ) -> None:
        self.heads, self.kv_heads, self.head_dim, self.hidden, self.ffn, self.eps, self.dtype = (
            heads,
            kv_heads,
            head_dim,
            hidden,
            ffn,
            eps,
            dtype,
        )
        self._layers: list[_Layer] = []
        self._kept: list[object] = []
        self._array: object = None
        fused_lib, linear_lib, functions = fused._library(), linear._library(), attention._functions()
        assert fused_lib is not None and linear_lib is not None and functions is not None, "ask available() first"
        attend, store = functions
        found = (linear_lib.pdlab_matvec, fused_lib.pdlab_rms_norm, fused_lib.pdlab_silu_and_mul, fused_lib.pdlab_rope, store, attend)
        self._sum = sum
        self._functions = _Functions(*(cast(function, c_void_p) for function in found), 0 if sum is None else cast(sum.function, c_void_p))

    def add_layer(
        self,
        linears: Sequence[tuple[Weight, Tensor | None]],
        norms: Sequence[Tensor | None],
        cache: tuple[Tensor, Tensor],
        window: int,
    ) -> None:
        """`linears`: (weight, bias) of qkv, out, gate_up, down. `norms`: of the input, after attention, of q and of k, or None."""
        self._kept += [linears, norms, cache]
        pointers = [0 if norm is None else norm.data_ptr() for norm in norms]
        self._layers.append(_Layer(*(linear_struct(w, b) for w, b in linears), *pointers, cache[0].data_ptr(), cache[1].data_ptr(), window))
        self._array = (_Layer * len(self._layers))(*self._layers)
        self.block_tokens, self.stored = cache[0].shape[2], attention.stored_as(self.dtype, cache[0].dtype)

    def __call__(
        self, residual: Tensor, positions: Tensor, slots: Tensor, tables: Tensor, starts: Tensor, contexts: Tensor, cos: Tensor, sin: Tensor
    ) -> Tensor:
        """`residual` [n <= 8, hidden] holds the embeddings, some of each sequence, and takes what the layers add; returned is what
        the last one adds, [n, hidden]. The rest is as for `paged_attention`, `store_kv` and `rope`. Raises what `sum` does."""
        lib = _library()
        assert lib is not None, "ask available() first"
        n = len(residual)
        width = n * max((self.heads + 2 * self.kv_heads) * self.head_dim, 2 * self.ffn, self.hidden)
        x, work, other = (torch.empty(size, dtype=self.dtype) for size in (n * self.hidden, width, width))
        shape = _Shape(
            self.dtype == torch.bfloat16,
            self.stored,
            len(self._layers),
            n,
            len(contexts),
            self.hidden,
            self.heads,
            self.kv_heads,
            self.head_dim,
            self.ffn,
            self.block_tokens,
            tables.stride(0),
            self.eps,
            self.head_dim**-0.5,
        )
        step = _Step(*(t.data_ptr() for t in (positions, slots, tables, starts, contexts, cos, sin)))
        late = lib.pdlab_decode(
            byref(self._functions),
            byref(shape),
            self._array,
            byref(step),
            None if self._sum is None else byref(self._sum.struct),
            residual.data_ptr(),
            x.data_ptr(),
            work.data_ptr(),
            other.data_ptr(),
            torch.get_num_threads(),
        )
        if self._sum is not None:
            self._sum.check(late)
        return x.view(n, self.hidden)
