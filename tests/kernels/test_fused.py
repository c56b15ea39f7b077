"""The small steps of a layer: compiled against the references, and those against torch."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pdlab.kernels.fused import reference, rms_norm, rope, silu_and_mul

TOLERANCE = {torch.float32: {"atol": 1e-5, "rtol": 1e-5}, torch.bfloat16: {"atol": 1e-2, "rtol": 1e-2}}
dtypes = st.sampled_from([torch.float32, torch.bfloat16])


def made(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(0, 70), dim=st.sampled_from([8, 20, 64, 576, 1000]), dtype=dtypes, added=st.booleans(), strided=st.booleans())
def test_rms_norm(tokens: int, dim: int, dtype: torch.dtype, added: bool, strided: bool) -> None:
    x = made(tokens, dim + 8, dtype=dtype)[:, :dim] if strided else made(tokens, dim, dtype=dtype)
    weight, before = made(dim, dtype=dtype, seed=1), made(tokens, dim, dtype=dtype, seed=2)
    ours, theirs = (before.clone(), before.clone()) if added else (None, None)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5, ours), reference.rms_norm(x, weight, 1e-5, theirs), **TOLERANCE[dtype])
    if ours is not None:
        assert torch.equal(ours, before + x)
        assert theirs is not None and torch.equal(ours, theirs)
    else:
        torch.testing.assert_close(rms_norm(x, weight, 1e-5), torch.nn.functional.rms_norm(x, (dim,), weight, 1e-5), **TOLERANCE[dtype])


@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(0, 30), ffn=st.sampled_from([8, 30, 512, 1536]), dtype=dtypes, size=st.sampled_from([1.0, 200.0]))
def test_silu_and_mul(tokens: int, ffn: int, dtype: torch.dtype, size: float) -> None:
    x = made(tokens, 2 * ffn, dtype=dtype) * size
    actual = silu_and_mul(x)
    torch.testing.assert_close(actual, reference.silu_and_mul(x), **TOLERANCE[dtype])
    assert actual.isfinite().all()


@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(0, 40), dim=st.sampled_from([8, 24, 64, 128]), group=st.integers(1, 4), dtype=dtypes)
def test_rope_turns_views_of_a_fused_tensor(tokens: int, dim: int, group: int, dtype: torch.dtype) -> None:
    angle = torch.arange(100.0)[:, None] / 10000 ** (torch.arange(dim // 2) * 2 / dim)
    positions = torch.randint(0, 100, (tokens,), generator=torch.Generator().manual_seed(3))
    qkv = made(tokens, (group + 2) * 2 * dim, dtype=dtype)
    before = qkv.clone()
    parts = [2 * group * dim, 2 * dim, 2 * dim]
    ours, theirs = (tuple(x.unflatten(-1, (-1, dim)) for x in t.split(parts, -1)) for t in (qkv, before.clone()))
    rope(ours[0], ours[1], positions, angle.cos(), angle.sin())
    reference.rope(theirs[0], theirs[1], positions, angle.cos(), angle.sin())
    torch.testing.assert_close(ours[0], theirs[0], **TOLERANCE[dtype])
    torch.testing.assert_close(ours[1], theirs[1], **TOLERANCE[dtype])
    assert torch.equal(ours[2], before.split(parts, -1)[2].unflatten(-1, (-1, dim)))


def test_rope_keeps_what_attention_sees_when_all_positions_shift() -> None:
    angle = torch.arange(60.0)[:, None] / 10000 ** (torch.arange(32) / 32)
    scores = []
    for shift in (0, 17):
        q, k = made(5, 1, 64, dtype=torch.float32), made(5, 1, 64, dtype=torch.float32, seed=1)
        rope(q, k, torch.arange(5) + shift, angle.cos(), angle.sin())
        scores.append(torch.einsum("qhd,khd->qk", q, k))
    torch.testing.assert_close(scores[0], scores[1], atol=1e-4, rtol=1e-4)
