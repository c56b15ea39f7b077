"""Blocks gathered from one cache and scattered into another."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pdlab.kernels.kv_blocks import gather_blocks, reference, scatter_blocks


@settings(max_examples=40, deadline=None)
@given(
    layers=st.integers(1, 4),
    planes=st.sampled_from([1, 2]),
    blocks=st.integers(1, 9),
    count=st.integers(0, 9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    ids=st.sampled_from([torch.int32, torch.int64]),
    part=st.booleans(),
    seed=st.integers(0, 99),
)
def test_what_is_gathered_comes_back_whole(
    layers: int, planes: int, blocks: int, count: int, dtype: torch.dtype, ids: torch.dtype, part: bool, seed: int
) -> None:
    rng = torch.Generator().manual_seed(seed)
    kv = torch.randn(layers, planes, blocks, 2, 4, 8, generator=rng).to(dtype)
    span = (layers // 2, layers) if part else None
    first, last = span or (0, layers)
    picked = torch.randperm(blocks, generator=rng)[:count].to(ids)
    packed = gather_blocks(kv, picked, layers=span)
    assert packed.is_contiguous() and packed.shape == (len(picked), last - first, planes, 2, 4, 8)
    assert torch.equal(packed, reference.gather_blocks(kv, picked, layers=span))

    to = torch.randperm(blocks, generator=rng)[: len(picked)].to(ids)
    ours, theirs = torch.zeros_like(kv), torch.zeros_like(kv)
    scatter_blocks(packed, ours, to, layers=span)
    reference.scatter_blocks(packed, theirs, to, layers=span)
    assert torch.equal(ours, theirs)
    assert torch.equal(ours[first:last, :, to], kv[first:last, :, picked])
    assert torch.equal(gather_blocks(ours, to, layers=span), packed)


@pytest.mark.parametrize("gather", [gather_blocks, reference.gather_blocks])
def test_a_buffer_may_be_given_and_used_again(gather: object) -> None:
    kv = torch.randn(3, 2, 70, 3, 16, 64)
    buffer = torch.empty(40, 3, 2, 3, 16, 64)
    picked = torch.arange(69, 49, -1)
    assert callable(gather)
    packed = gather(kv, picked, buffer[:20])
    assert packed.data_ptr() == buffer.data_ptr()
    assert torch.equal(buffer[:20], kv[:, :, picked].permute(2, 0, 1, 3, 4, 5))
