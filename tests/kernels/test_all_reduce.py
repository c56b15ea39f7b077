"""Sums and gathers over ranks by shared memory; the ranks are threads here."""

from __future__ import annotations

import mmap
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from pdlab.kernels.all_reduce import SharedSum, available

pytestmark = pytest.mark.skipif(not available(), reason="no C++ compiler")
SLOT_BYTES = 512


def summed(parts: list[list[Tensor]]) -> list[list[Tensor]]:
    """What each rank has after summing its tensors one after another."""
    size = len(parts)
    memory = mmap.mmap(-1, SharedSum.bytes(size, SLOT_BYTES))

    def rank(number: int) -> list[Tensor]:
        add = SharedSum(memory, number, size, lambda _: None, SLOT_BYTES)
        mine = [x.clone() for x in parts[number]]
        for x in mine:
            add(x)
        return mine

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(rank, range(size)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_rank_gets_the_sum_in_their_order_bit_for_bit(size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(size)
    shapes = [(1,), (64,), (3, 67), (1000,), (), (0,), (17,)] * 5  # less than a turn takes, just as much, and many turns
    parts = [[torch.randn(shape, generator=generator).to(dtype) for shape in shapes] for _ in range(size)]
    expected = []
    for of_all in zip(*parts, strict=True):
        total = of_all[0].float()
        for x in of_all[1:]:
            total = total + x.float()
        expected.append(total.to(dtype))
    for mine in summed(parts):
        for x, wanted in zip(mine, expected, strict=True):
            assert torch.equal(x, wanted)


@pytest.mark.parametrize("size", [2, 4])
def test_rank_0_gathers_what_each_has_between_sums(size: int) -> None:
    """The others go on at once, up to where what they have put would be overwritten."""
    memory = mmap.mmap(-1, SharedSum.bytes(size, SLOT_BYTES))
    shapes = [(1,), (3, 40), (2, 300), (0,)] * 4 + [(7,), (700,)] * 20

    def rank(number: int) -> list[Tensor]:
        shared, found = SharedSum(memory, number, size, lambda _: None, SLOT_BYTES), []
        for i, shape in enumerate(shapes):
            if i % 3 == 2:
                shared(one := torch.ones(50))
                assert torch.equal(one, torch.full((50,), float(size)))
            found.append(shared.gather(torch.full(shape, float(100 * i + number))))
        return found

    with ThreadPoolExecutor(size) as pool:
        first, *others = pool.map(rank, range(size))
    for i, (shape, all_) in enumerate(zip(shapes, first, strict=True)):
        assert torch.equal(all_, torch.stack([torch.full(shape, float(100 * i + number)) for number in range(size)]))
    assert not any(each.numel() for other in others for each in other)


def test_a_rank_that_does_not_come_is_asked_after() -> None:
    asked = []

    def missing(rank: int) -> None:
        asked.append(rank)
        if len(asked) == 2:
            raise RuntimeError(f"rank {rank} has ended")

    alone = SharedSum(mmap.mmap(-1, SharedSum.bytes(2, SLOT_BYTES)), 0, 2, missing, SLOT_BYTES)
    for wait in (alone, alone.gather):
        asked.clear()
        with pytest.raises(RuntimeError, match="rank 1 has ended"):
            wait(torch.ones(3))
        assert asked == [1, 1]


def test_what_it_does_not_take() -> None:
    assert SharedSum.takes(torch.ones(2, 3)) and SharedSum.takes(torch.ones(2, 3, dtype=torch.bfloat16))
    assert not SharedSum.takes(torch.ones(2, 3).T) and not SharedSum.takes(torch.ones(2, dtype=torch.float64))
