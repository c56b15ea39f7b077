"""Products of a few vectors with plain and quantised weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pdlab.kernels import linear
from pdlab.kernels.linear import reference

TOLERANCE = {torch.float32: {"atol": 1e-3, "rtol": 1e-4}, torch.bfloat16: {"atol": 0.25, "rtol": 2e-2}}
dtypes = st.sampled_from([torch.float32, torch.bfloat16])


def made(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@settings(max_examples=50, deadline=None)
@given(
    n=st.integers(0, 9),
    inputs=st.sampled_from([1, 8, 31, 64, 100, 576]),
    out=st.sampled_from([1, 3, 8, 61, 300]),
    x_dtype=dtypes,
    weight_dtype=dtypes,
    bias=st.booleans(),
    strided=st.booleans(),
)
def test_matvec_is_the_product(
    n: int, inputs: int, out: int, x_dtype: torch.dtype, weight_dtype: torch.dtype, bias: bool, strided: bool
) -> None:
    x = made(n, inputs + 5, dtype=x_dtype)[:, 2 : inputs + 2] if strided else made(n, inputs, dtype=x_dtype)
    weight = made(out, inputs, seed=1, dtype=weight_dtype)
    added = made(out, seed=2, dtype=x_dtype) if bias else None
    expected = x.double() @ weight.double().T + (0 if added is None else added.double())
    actual = linear.matvec(x, weight, added)
    assert actual.dtype == x_dtype
    torch.testing.assert_close(actual.double(), expected, **TOLERANCE[x_dtype])


@settings(max_examples=50, deadline=None)
@given(
    n=st.integers(0, 9),
    groups=st.integers(1, 5),
    out=st.sampled_from([1, 7, 16, 130]),
    group=st.sampled_from([32, 128]),
    zeros=st.booleans(),
    dtype=dtypes,
    bias=st.booleans(),
)
def test_quantised_products_are_those_of_the_dequantised_weight(
    n: int, groups: int, out: int, group: int, zeros: bool, dtype: torch.dtype, bias: bool
) -> None:
    x, weight = made(n, groups * group, dtype=dtype), made(out, groups * group, seed=1)
    added = made(out, seed=2, dtype=dtype) if bias else None
    plus = 0 if added is None else added.double()
    for product, packed, plain in (
        (linear.matvec_int8, w8 := linear.quantize_int8(weight), linear.dequantize_int8(w8)),
        (linear.matvec_int4, w4 := linear.quantize_int4(weight, group, zeros=zeros), linear.dequantize_int4(w4)),
    ):
        expected = x.double() @ plain.double().T + plus
        torch.testing.assert_close(product(x, packed, added).double(), expected, **TOLERANCE[dtype])  # type: ignore[operator]


@pytest.mark.parametrize("inputs", [7, 64])
def test_int8_is_within_half_a_step(inputs: int) -> None:
    weight = made(20, inputs)
    packed = linear.quantize_int8(weight)
    assert ((linear.dequantize_int8(packed) - weight).abs() <= packed.scale[:, None] * 0.501).all()


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("zeros", [False, True])
def test_int4_is_within_a_step(group: int, zeros: bool) -> None:
    weight = made(20, 256)
    packed = linear.quantize_int4(weight, group, zeros=zeros)
    assert packed.packed.shape == (20, 128)
    error = (linear.dequantize_int4(packed) - weight).abs().unflatten(1, (-1, group))
    assert (error <= packed.scale.abs()[..., None] * (0.501 if zeros else 1.001)).all()


def test_a_weight_of_zeros_stays_one() -> None:
    weight = torch.zeros(4, 64)
    for plain in (
        reference.dequantize_int8(linear.quantize_int8(weight)),
        reference.dequantize_int4(linear.quantize_int4(weight)),
        reference.dequantize_int4(linear.quantize_int4(weight, zeros=True)),
    ):
        torch.testing.assert_close(plain, weight)
