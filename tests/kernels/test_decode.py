"""A compiled decode step against the same layers in plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pdlab.kernels.decode import DecodeStep, Weight, available
from pdlab.kernels.decode.reference import PlainDecodeStep
from pdlab.kernels.linear import quantize_int4, quantize_int8

HIDDEN, FFN, BLOCK_TOKENS, BLOCKS = 64, 96, 4, 12  # of each sequence
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 6e-2}

pytestmark = pytest.mark.skipif(not available(torch.float32), reason="needs a C++ compiler")


class Model:
    """Random layers, once for each of the two steps, which have caches of their own."""

    def __init__(self, kind: str, layers: int, heads: tuple[int, int, int], seqs: int, *, biased: bool, normed: bool, window: int) -> None:
        self.generator = torch.Generator().manual_seed(5)
        self.dtype = torch.float32 if kind == "float32" else torch.bfloat16
        many, few, dim = heads
        sizes = {"heads": many, "kv_heads": few, "head_dim": dim, "hidden": HIDDEN, "ffn": FFN, "eps": 1e-5, "dtype": self.dtype}
        self.compiled, self.plain = DecodeStep(**sizes), PlainDecodeStep(**sizes)
        self.caches: list[list[Tensor]] = []
        for _ in range(layers):
            shapes = ((many + 2 * few) * dim, HIDDEN), (HIDDEN, many * dim), (2 * FFN, HIDDEN), (HIDDEN, FFN)
            linears = [(self.weight(kind, *shape), self.randn(shape[0]) if biased else None) for shape in shapes]
            norms = [self.near_one(HIDDEN), self.near_one(HIDDEN), *((self.near_one(dim), self.near_one(dim)) if normed else (None, None))]
            cache = self.randn(2, seqs * BLOCKS, few, BLOCK_TOKENS, dim)
            self.caches.append([cache.clone(), cache.clone()])
            for step, own in zip((self.compiled, self.plain), self.caches[-1], strict=True):
                step.add_layer(linears, norms, (own[0], own[1]), window)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.dtype)

    def near_one(self, size: int) -> Tensor:
        return 1 + self.randn(size) / 4

    def weight(self, kind: str, out: int, inputs: int) -> Weight:
        plain = torch.randn(out, inputs, generator=self.generator) / inputs**0.5
        if kind in ("int4", "int4 with zeros"):
            return quantize_int4(plain, zeros=kind != "int4")
        return quantize_int8(plain) if kind == "int8" else plain.to(self.dtype)


def inputs_of(contexts: list[int], dim: int) -> tuple[Tensor, ...]:
    """The last token of each sequence; its blocks lie in no order."""
    lengths = torch.tensor(contexts)
    tables = torch.randperm(len(contexts) * BLOCKS, generator=torch.Generator().manual_seed(1)).view(len(contexts), BLOCKS)
    last = lengths - 1
    slots = tables.gather(1, (last // BLOCK_TOKENS)[:, None])[:, 0] * BLOCK_TOKENS + last % BLOCK_TOKENS
    angle = torch.arange(float(BLOCKS * BLOCK_TOKENS))[:, None] / 10000 ** (torch.arange(dim // 2) * 2 / dim)
    starts = torch.arange(len(contexts) + 1, dtype=torch.int32)
    return last, slots, tables.int(), starts, lengths.int(), angle.cos(), angle.sin()


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(["float32", "bfloat16", "int8", "int4", "int4 with zeros"]),
    layers=st.integers(1, 3),
    heads=st.sampled_from([(4, 2, 16), (2, 2, 32), (4, 1, 64)]),
    contexts=st.lists(st.integers(1, BLOCKS * BLOCK_TOKENS), min_size=1, max_size=8),
    biased=st.booleans(),
    normed=st.booleans(),
    window=st.sampled_from([0, 5]),
)
def test_a_step_is_that_of_the_plain_layers(
    kind: str, layers: int, heads: tuple[int, int, int], contexts: list[int], biased: bool, normed: bool, window: int
) -> None:
    model = Model(kind, layers, heads, len(contexts), biased=biased, normed=normed, window=window)
    tolerance = {"atol": TOLERANCE[model.dtype], "rtol": TOLERANCE[model.dtype]}
    ours = model.randn(len(contexts), HIDDEN)
    theirs = ours.clone()
    inputs = inputs_of(contexts, heads[2])
    torch.testing.assert_close(model.compiled(ours, *inputs), model.plain(theirs, *inputs), **tolerance)
    torch.testing.assert_close(ours, theirs, **tolerance)
    for written, expected in model.caches:
        torch.testing.assert_close(written, expected, **tolerance)
