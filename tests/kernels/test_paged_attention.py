"""Paged attention: the compiled kernel against the reference, and both against torch's own attention."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pdlab.kernels.paged_attention import cpu, paged_attention, reference, store_kv

compiled = pytest.mark.skipif(not cpu.available(torch.empty(0)), reason="no C++ compiler")
TOLERANCE = {torch.float32: {"atol": 2e-5, "rtol": 1e-4}, torch.bfloat16: {"atol": 2e-2, "rtol": 2e-2}}
E4M3 = torch.float8_e4m3fn
Dtypes = tuple[torch.dtype, torch.dtype]
DTYPES = [  # of what is computed, and of KV
    *((dtype, dtype) for dtype in (torch.float32, torch.bfloat16)),
    *((dtype, E4M3) for dtype in (torch.float32, torch.bfloat16)),
    (torch.float32, torch.bfloat16),
]


@dataclass(frozen=True, slots=True)
class Batch:
    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    tables: Tensor
    starts: Tensor
    contexts: Tensor

    def args(self) -> tuple[Tensor, ...]:
        return self.q, self.k_cache, self.v_cache, self.tables, self.starts, self.contexts


def batch(
    lengths: list[tuple[int, int]],
    *,
    kv_heads: int = 3,
    group: int = 3,
    dim: int = 64,
    block_tokens: int = 16,
    dtype: torch.dtype = torch.float32,
    stored: torch.dtype | None = None,
    seed: int = 0,
) -> Batch:
    """Sequences of (queries, context) over shuffled blocks; q is a view into a fused qkv tensor. Blocks nobody owns hold NaN."""
    rng = torch.Generator().manual_seed(seed)
    need = [-(-context // block_tokens) for _, context in lengths]
    blocks = sum(need) + 2
    order = torch.randperm(blocks, generator=rng).int()
    tables = torch.full((len(lengths), max(need) + 1), 2**30, dtype=torch.int32)
    caches = [torch.randn(blocks, kv_heads, block_tokens, dim, generator=rng) for _ in range(2)]
    used = 0
    for seq, count in enumerate(need):
        tables[seq, :count] = order[used : used + count]
        used += count
        tail = lengths[seq][1] % block_tokens
        for cache in caches:
            if tail:
                cache[order[used - 1], :, tail:] = float("nan")
    for cache in caches:
        cache[order[used:].long()] = float("nan")
    queries = [count for count, _ in lengths]
    qkv = torch.randn(sum(queries), (group + 2) * kv_heads * dim, generator=rng).to(dtype)
    q = qkv[:, : group * kv_heads * dim].unflatten(-1, (group * kv_heads, dim))
    starts = torch.tensor([0, *queries], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    k, v = (cache.to(dtype).to(stored or dtype) for cache in caches)
    return Batch(q, k, v, tables, starts, torch.tensor([c for _, c in lengths], dtype=torch.int32))


sequences = st.lists(
    st.tuples(st.sampled_from([0, 1, 1, 1, 2, 3, 7, 17, 40, 100]), st.integers(0, 200)).map(lambda qc: (qc[0], max(1, qc[0] + qc[1]))),
    min_size=1,
    max_size=5,
)


@compiled
@settings(max_examples=50, deadline=None)
@given(
    lengths=sequences,
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 3, 4, 7, 8, 16]),
    dim=st.sampled_from([8, 24, 64, 64, 80, 128, 256]),
    block_tokens=st.sampled_from([1, 5, 16, 32, 256]),
    window=st.sampled_from([0, 0, 1, 13, 64, 1000]),
    dtypes=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_the_compiled_kernel_agrees_with_the_reference(
    lengths: list[tuple[int, int]], kv_heads: int, group: int, dim: int, block_tokens: int, window: int, dtypes: Dtypes, seed: int
) -> None:
    dtype, stored = dtypes
    made = batch(lengths, kv_heads=kv_heads, group=group, dim=dim, block_tokens=block_tokens, dtype=dtype, stored=stored, seed=seed)
    expected = reference.paged_attention(*made.args(), scale=dim**-0.5, window=window)
    actual = cpu.paged_attention(*made.args(), scale=dim**-0.5, window=window)
    torch.testing.assert_close(actual, expected, **TOLERANCE[dtype])


@pytest.mark.parametrize("lengths", [[(1, 300), (3, 40)], [(90, 130)]], ids=["few", "many"])
def test_attention_to_fp8_is_attention_to_what_it_stands_for(lengths: list[tuple[int, int]]) -> None:
    made = batch(lengths, stored=E4M3)
    wide = dataclasses.replace(made, k_cache=made.k_cache.float(), v_cache=made.v_cache.float())
    found, expected = (paged_attention(*one.args(), scale=0.125) for one in (made, wide))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@compiled
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("lengths", [[(1, 3000)], [(16, 2500)], [(2, 1700), (1, 30), (300, 900)], [(1, 400)] * 12])
@pytest.mark.parametrize("window", [0, 700])
def test_work_is_split_over_the_context_without_a_trace(lengths: list[tuple[int, int]], threads: int, window: int) -> None:
    made = batch(lengths)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        actual = cpu.paged_attention(*made.args(), scale=0.125, window=window)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(actual, reference.paged_attention(*made.args(), scale=0.125, window=window), **TOLERANCE[torch.float32])


@compiled
@pytest.mark.parametrize("lengths", [[(1, 30), (3, 9)], [(70, 90), (1, 5)], [(2, 1700), (1, 30), (300, 900)]], ids=["few", "many", "split"])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_sink_takes_its_share_of_the_softmax(lengths: list[tuple[int, int]], threads: int) -> None:
    made = batch(lengths)
    sinks = torch.linspace(-3.0, 60.0, made.q.shape[1])  # of the last there is nothing left for the tokens
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        actual = cpu.paged_attention(*made.args(), scale=0.125, sinks=sinks)
    finally:
        torch.set_num_threads(before)
    expected = reference.paged_attention(*made.args(), scale=0.125, sinks=sinks)
    torch.testing.assert_close(actual, expected, **TOLERANCE[torch.float32])
    assert actual[:, -1].abs().max() < 1e-9 < actual[:, 0].abs().max()


@compiled
@pytest.mark.parametrize("lengths", [[(1, 3000)], [(5, 700), (1, 40)]])
@pytest.mark.parametrize("stored", [torch.float32, E4M3])
def test_heads_as_wide_as_a_latent(lengths: list[tuple[int, int]], stored: torch.dtype) -> None:
    made = batch(lengths, kv_heads=1, group=16, dim=576, stored=stored)
    made = dataclasses.replace(made, v_cache=made.k_cache)
    actual = cpu.paged_attention(*made.args(), scale=0.05)
    torch.testing.assert_close(actual, reference.paged_attention(*made.args(), scale=0.05), **TOLERANCE[torch.float32])


@compiled
@pytest.mark.parametrize("dim", [12, 20])
def test_many_rows_of_heads_that_fill_no_run(dim: int) -> None:
    made = batch([(900, 900)], dim=dim)
    actual = cpu.paged_attention(*made.args(), scale=0.2)
    torch.testing.assert_close(actual, reference.paged_attention(*made.args(), scale=0.2), **TOLERANCE[torch.float32])


def dense(cache: Tensor, table: Tensor, context: int) -> Tensor:
    """One sequence's [1, kv_heads, context, dim], the slow way."""
    block_tokens = cache.shape[2]
    return torch.stack([cache[table[i // block_tokens], :, i % block_tokens] for i in range(context)], 1)[None]


@pytest.mark.parametrize(
    "lengths", [[(1, 77), (1, 5)], [(60, 60)], [(30, 75), (1, 90), (1, 1), (50, 50)]], ids=["decode", "prefill", "mixed"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_prefill_and_mixed_agree_with_torch(lengths: list[tuple[int, int]], dtype: torch.dtype) -> None:
    made = batch(lengths, dtype=dtype)
    actual = paged_attention(*made.args(), scale=0.125)
    for seq, (queries, context) in enumerate(lengths):
        first = int(made.starts[seq])
        k, v = (dense(cache, made.tables[seq], context) for cache in (made.k_cache, made.v_cache))
        seen = torch.ones(queries, context, dtype=torch.bool).tril(context - queries)
        q = made.q[first : first + queries].transpose(0, 1)[None]
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=0.125, enable_gqa=True)
        torch.testing.assert_close(actual[first : first + queries], expected[0].transpose(0, 1), **TOLERANCE[dtype])


def test_a_prompt_in_chunks_is_a_prompt_at_once() -> None:
    whole = batch([(200, 200)])
    at_once = paged_attention(*whole.args(), scale=0.125)
    for first, last in ((0, 64), (64, 65), (65, 200)):
        starts, contexts = torch.tensor([0, last - first], dtype=torch.int32), torch.tensor([last], dtype=torch.int32)
        chunk = paged_attention(whole.q[first:last], whole.k_cache, whole.v_cache, whole.tables, starts, contexts, scale=0.125)
        torch.testing.assert_close(chunk, at_once[first:last], **TOLERANCE[torch.float32])


def test_large_scores_do_not_overflow() -> None:
    made = batch([(1, 300), (20, 300)])
    for scale in (40.0, 1e-6):
        expected = reference.paged_attention(*made.args(), scale=scale)
        torch.testing.assert_close(paged_attention(*made.args(), scale=scale), expected, atol=1e-4, rtol=1e-3)


def test_the_output_may_be_given_and_strided() -> None:
    made = batch([(1, 30), (9, 20)])
    wide = torch.zeros(10, 9, 80)
    given_back = paged_attention(*made.args(), scale=0.125, out=wide[..., 8:72])
    assert given_back.data_ptr() == wide[..., 8:72].data_ptr()
    torch.testing.assert_close(wide[..., 8:72], reference.paged_attention(*made.args(), scale=0.125), **TOLERANCE[torch.float32])
    assert not wide[..., :8].any() and not wide[..., 72:].any()


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(0, 40),
    kv_heads=st.integers(1, 4),
    dim=st.sampled_from([8, 64]),
    block_tokens=st.sampled_from([1, 16]),
    dtypes=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_kv_is_stored_at_its_slots_and_nowhere_else(
    tokens: int, kv_heads: int, dim: int, block_tokens: int, dtypes: Dtypes, seed: int
) -> None:
    dtype, stored = dtypes
    rng = torch.Generator().manual_seed(seed)
    blocks = -(-tokens // block_tokens) + 3
    qkv = (torch.randn(tokens, 4 * kv_heads * dim, generator=rng) * 100).to(dtype)  # some beyond the largest float8
    k = qkv[:, kv_heads * dim : 2 * kv_heads * dim].unflatten(-1, (kv_heads, dim))
    v = qkv[:, 3 * kv_heads * dim :].unflatten(-1, (kv_heads, dim))
    slots = torch.randperm(blocks * block_tokens, generator=rng)[:tokens]
    slots[torch.rand(tokens, generator=rng) < 0.2] = -1
    kept, expected = (torch.zeros(2, blocks, kv_heads, block_tokens, dim, dtype=stored) for _ in range(2))
    store_kv(k, v, kept[0], kept[1], slots)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            expected[0, slot // block_tokens, :, slot % block_tokens] = saturated(k[token], stored)
            expected[1, slot // block_tokens, :, slot % block_tokens] = saturated(v[token], stored)
    assert torch.equal(kept.view(torch.uint8), expected.view(torch.uint8))
    again = torch.zeros_like(kept)
    reference.store_kv(k, v, again[0], again[1], slots)
    assert torch.equal(again.view(torch.uint8), expected.view(torch.uint8))


def saturated(values: Tensor, dtype: torch.dtype) -> Tensor:
    return (values.float().clamp(-448.0, 448.0) if dtype == E4M3 else values).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_is_rounded_as_torch_rounds_it_whatever_the_bits(dtype: torch.dtype) -> None:
    """Ties, denormals, what is beyond the largest, infinities and what is no number: there and back."""
    edges = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 448.0, 463.9, 464.0, 465.0, 2.0**-9, 2.0**-10, 1.5 * 2.0**-9, 2.0**-6, 17.0, 19.0]
    bits = torch.randint(0, 256, (64 * 64 * 16 * dtype.itemsize,), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    values = bits.view(dtype)
    values[: len(edges)] = torch.tensor(edges).to(dtype)
    values[32768:] = (torch.arange(32768) - 16384).float().mul(2.0**-12).to(dtype)
    rows = values.view(1024, 1, 64)
    cache = torch.zeros(64, 1, 16, 64, dtype=E4M3)
    store_kv(rows, rows, cache, cache, torch.arange(1024))
    expected = saturated(values, E4M3)
    assert torch.equal(cache.flatten().view(torch.uint8), expected.view(torch.uint8))
    alone = torch.arange(1025, dtype=torch.int32)  # one key each: attention gives its value
    widened = torch.arange(256, dtype=torch.uint8).repeat(256).view(E4M3).view(1024, 1, 1, 64)
    ones = torch.ones(1024, dtype=torch.int32)
    q = torch.zeros(1024, 1, 64, dtype=dtype)
    found = paged_attention(q, cache.new_zeros(1024, 1, 1, 64), widened, alone[:1024, None], alone, ones, scale=1.0)
    assert torch.equal(found.flatten().float().nan_to_num(9.0), widened.flatten().float().nan_to_num(9.0))
