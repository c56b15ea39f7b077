"""Grouped expert products are those of the experts, one token after the other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pdlab.kernels.decode.reference import Weight
from pdlab.kernels.experts import Activation, ExpertWeights, GroupedExperts
from pdlab.kernels.linear import Fp8Weight, Mxfp4Weight, dequantize_int4, dequantize_int8, quantize_int4, quantize_int8

TOLERANCE = {torch.float32: {"atol": 1e-4, "rtol": 1e-4}, torch.bfloat16: {"atol": 0.05, "rtol": 3e-2}}


def fp8(weight: Tensor, block: tuple[int, int] = (32, 48)) -> tuple[Weight, Tensor]:
    """With scales that no two blocks share; the last ones of a row or column may be cut short."""
    rows, columns = (-(-size // each) for size, each in zip(weight.shape, block, strict=True))
    scale = torch.linspace(0.002, 0.004, rows * columns).view(rows, columns)
    each = scale.repeat_interleave(block[0], 0)[: len(weight)].repeat_interleave(block[1], 1)[:, : weight.shape[1]]
    stored = Fp8Weight((weight / each).to(torch.float8_e4m3fn), scale, block)
    return stored, stored.values.float() * each


def mxfp4(weight: Tensor) -> tuple[Weight, Tensor]:
    """Codes and powers at random: all of them come."""
    random = torch.Generator().manual_seed(len(weight))
    packed = torch.randint(256, (len(weight), weight.shape[1] // 2), dtype=torch.uint8, generator=random)
    scale = torch.randint(121, 125, (len(weight), weight.shape[1] // 32), dtype=torch.uint8, generator=random)
    codes = torch.stack((packed & 15, packed >> 4), 2).flatten(1).int()
    size = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])[codes & 7]
    return Mxfp4Weight(packed, scale), size * (1 - 2 * (codes >> 3)) * (2.0 ** (scale.float() - 127)).repeat_interleave(32, 1)


KINDS: dict[str, Callable[[Tensor], tuple[Weight, Tensor]]] = {
    "float32": lambda w: (w, w),
    "bfloat16": lambda w: (w.bfloat16(), w.bfloat16().float()),
    "int8": lambda w: (q := quantize_int8(w), dequantize_int8(q)),
    "int4": lambda w: (q := quantize_int4(w), dequantize_int4(q)),
    "fp8": fp8,
    "mxfp4": mxfp4,
}


def layer(
    kind: str, count: int, hidden: int, width: int, *, bias: bool, dtype: torch.dtype
) -> tuple[list[ExpertWeights], list[list[Tensor]]]:
    """Experts as they are stored, and each one's matrices and biases in float64."""
    random = torch.Generator().manual_seed(3)
    stored: list[ExpertWeights] = []
    plain = []
    for _ in range(count):
        pair, wide = [], []
        for out, inputs in ((2 * width, hidden), (hidden, width)):
            weight, exact = KINDS[kind](torch.randn(out, inputs, generator=random) * inputs**-0.5)
            added = torch.randn(out, generator=random).to(dtype) if bias else None
            pair.append((weight, added))
            wide += [exact.double(), torch.zeros(out).double() if added is None else added.double()]
        stored.append((pair[0], pair[1]))
        plain.append(wide)
    return stored, plain


def by_hand(x: Tensor, ids: Tensor, weights: Tensor, plain: list[list[Tensor]], activation: Activation) -> Tensor:
    rows = []
    for vector, chosen, shares in zip(x.double(), ids.tolist(), weights.double(), strict=True):
        total = torch.zeros_like(vector)
        for expert, share in zip(chosen, shares, strict=True):
            w1, b1, w2, b2 = plain[expert]
            gate, up = (w1 @ vector + b1).chunk(2)
            if activation.limit:
                gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
            total += share * (w2 @ (gate * torch.sigmoid(activation.alpha * gate) * (up + activation.shift)) + b2)
        rows.append(total)
    return torch.stack(rows)


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.sampled_from([1, 2, 7, 33]),
    chosen=st.sampled_from([1, 3]),
    shape=st.sampled_from([(64, 32), (96, 96), (160, 64)]),
    kind=st.sampled_from(list(KINDS)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    bias=st.booleans(),
    activation=st.sampled_from([Activation(), Activation(1.702, 0.7, 1.0)]),
)
def test_grouped_experts_are_the_experts(
    tokens: int, chosen: int, shape: tuple[int, int], kind: str, dtype: torch.dtype, bias: bool, activation: Activation
) -> None:
    hidden, width = shape
    stored, plain = layer(kind, 5, hidden, width, bias=bias, dtype=dtype)
    random = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, hidden + 3, generator=random).to(dtype)[:, 1 : hidden + 1]
    ids = torch.stack([torch.randperm(5, generator=random)[:chosen] for _ in range(tokens)])
    weights = torch.rand(tokens, chosen, generator=random)
    found = GroupedExperts(stored, hidden, width, activation)(x, ids, weights)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), by_hand(x, ids, weights, plain, activation), **TOLERANCE[dtype])


@pytest.mark.parametrize(("hidden", "width"), [(50, 21), (33, 7)])
def test_widths_that_no_vector_divides(hidden: int, width: int) -> None:
    stored, plain = layer("float32", 4, hidden, width, bias=True, dtype=torch.float32)
    x, ids, weights = torch.randn(3, hidden), torch.tensor([[0, 2], [2, 3], [2, 0]]), torch.rand(3, 2)
    found = GroupedExperts(stored, hidden, width)(x, ids, weights)
    torch.testing.assert_close(found.double(), by_hand(x, ids, weights, plain, Activation()), **TOLERANCE[torch.float32])


def test_extreme_gates_overflow_nothing() -> None:
    stored, _ = layer("float32", 1, 32, 32, bias=False, dtype=torch.float32)
    found = GroupedExperts(stored, 32, 32)(torch.randn(2, 32) * 1e4, torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1))
    assert found.isfinite().all()


def test_without_a_compiler_the_reference_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    stored, _ = layer("int8", 3, 64, 32, bias=False, dtype=torch.float32)
    compiled = GroupedExperts(stored, 64, 32)
    monkeypatch.setattr("pdlab.kernels.experts.cpu.available", lambda experts: False)
    x, ids, weights = torch.randn(4, 64), torch.tensor([[0, 1], [1, 2], [0, 2], [2, 1]]), torch.rand(4, 2)
    torch.testing.assert_close(GroupedExperts(stored, 64, 32)(x, ids, weights), compiled(x, ids, weights), atol=1e-4, rtol=1e-4)
