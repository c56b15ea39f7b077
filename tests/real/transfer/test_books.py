"""Leases and tickets, without sockets."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch

from pdlab.kernels.kv_blocks import gather_blocks, reference
from pdlab.real.transfer.blocks import Blocks, Ids, KvPart, Layers
from pdlab.real.transfer.leases import Leases
from pdlab.real.transfer.result import TransferResult, TransferStopped
from pdlab.real.transfer.tickets import Expected, Tickets
from tests.real.transfer.peer import memory

ME = "p", "1"


def ids(*blocks: int) -> Ids:
    return np.array(blocks, np.int32)


def test_a_lease_covers_its_blocks_until_it_ends() -> None:
    leases = Leases()
    leases.offer("a", ids(1, 2, 3))
    leases.check("a", ids(3, 1))
    leases.check("a", ids())
    with pytest.raises(TransferStopped, match="does not cover block 4") as told:
        leases.check("a", ids(4))
    assert told.value.status == "failed"
    assert "a" in leases and leases.end("a", "expired")
    with pytest.raises(TransferStopped, match="lease a has ended: expired") as told:
        leases.check("a", ids(1))
    assert told.value.status == "expired"
    assert "a" not in leases and not leases.end("a", "released") and len(leases) == 0
    with pytest.raises(AssertionError, match="used before"):
        leases.offer("a", ids(1))


def test_finishing_twice_with_the_same_number_gets_the_same_answer() -> None:
    leases = Leases()
    leases.offer("a", ids(1, 2))
    assert leases.finish("a", ids(1), transfer=7, release=False) is None
    assert leases.finish("a", ids(2), transfer=8, release=True) == {1, 2}
    assert leases.finish("a", ids(2), transfer=8, release=True) is None
    with pytest.raises(TransferStopped, match="has ended: read"):
        leases.finish("a", ids(2), transfer=9, release=True)


def opened(blocks: Ids) -> tuple[Tickets, list[TransferResult]]:
    tickets, ended = Tickets(), list[TransferResult]()
    tickets.open("t", Expected(blocks, 4, 4 * len(blocks), (0, 2), 1), ended.append)
    return tickets, ended


def part(blocks: Ids, layers: Layers, *, unit: int = 4, heads: range = range(1)) -> KvPart:
    return KvPart(blocks, unit, heads, layers)


def test_a_ticket_is_done_when_every_layer_of_every_block_has_come() -> None:
    tickets, ended = opened(ids(5, 3))
    for layers, blocks in (((0, 1), ids(3)), ((1, 2), ids(5, 3)), ((0, 1), ids(5))):
        assert not ended
        one = tickets.begin("t", ME, part(blocks, layers), 10, 0.0)
        with one.writing():
            pass
        one.commit()
        one.leave()
    assert [(result.status, result.bytes) for result in ended] == [("done", 40)]
    assert tickets.begin("t", ME, part(ids(5), (0, 1)), 10, 0.0).arrived
    assert len(tickets) == 0


def test_a_closed_ticket_resolves_with_its_last_writer() -> None:
    tickets, ended = opened(ids(5, 3))
    one = tickets.begin("t", ME, part(ids(5), (0, 2)), 10, 0.0)
    with one.writing():
        assert tickets.close("t", "failed", "deadline") and not tickets.close("t", "done", "")
        assert not ended  # its blocks are still being written
        with pytest.raises(TransferStopped) as told, one.writing():
            raise AssertionError
        assert told.value.status == "expired"
    assert [(result.status, result.bytes, result.reason) for result in ended] == [("failed", 0, "deadline")]
    with pytest.raises(TransferStopped):
        one.commit()
    one.leave()
    assert len(ended) == 1


def test_an_overlapping_part_waits_and_the_ticket_s_end_wakes_it() -> None:
    tickets, ended = opened(ids(5, 3))
    first = tickets.begin("t", ME, part(ids(5), (0, 2)), 10, 0.0)
    tickets.begin("t", ME, part(ids(3), (0, 2)), 10, 0.0).leave()  # no overlap
    with pytest.raises(TransferStopped, match="still under way"):
        tickets.begin("t", ME, part(ids(5, 3), (1, 2)), 10, time.monotonic() + 0.02)
    found: list[str] = []

    def second() -> None:
        try:
            tickets.begin("t", ME, part(ids(5), (0, 1)), 10, time.monotonic() + 10)
        except TransferStopped as trouble:
            found.append(trouble.status)

    waiting = threading.Thread(target=second)
    waiting.start()
    time.sleep(0.05)
    tickets.close("t", "failed", "cancelled")
    waiting.join(60)
    assert found == ["expired"] and len(ended) == 1
    first.leave()


def test_no_block_is_expected_twice() -> None:
    tickets, _ = opened(ids(5, 3))
    with pytest.raises(AssertionError, match="ticket t already expects block 3"):
        tickets.open("u", Expected(ids(1, 3), 4, 8, (0, 1), 1), lambda _: None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layers", [(0, 4), (1, 3)])
def test_blocks_are_packed_as_the_kernel_packs_them(dtype: torch.dtype, layers: tuple[int, int]) -> None:
    kv = memory(20, dtype, seed=1)
    blocks, chosen = Blocks(kv), ids(19, 2, 3, 4, 0)
    all_of_it = blocks.whole(chosen, layers)
    buffer = torch.zeros(5 * blocks.run_bytes(all_of_it), dtype=torch.uint8)
    assert blocks.pack(all_of_it, buffer.data_ptr()) == buffer.numel()
    for gather in (gather_blocks, reference.gather_blocks):
        assert torch.equal(buffer, gather(kv, torch.from_numpy(chosen), layers=layers).view(torch.uint8).flatten())
    other = memory(9, dtype, seed=2)
    expected = other.clone()
    into = Blocks(other).whole(ids(8, 1, 0, 5, 6), layers)
    Blocks(other).unpack(buffer.data_ptr(), into)
    span = slice(*layers)
    expected.view(torch.uint8)[span, :, [8, 1, 0, 5, 6]] = kv.view(torch.uint8)[span, :, chosen.tolist()]
    assert torch.equal(other.view(torch.uint8), expected.view(torch.uint8))
    copied = memory(9, dtype, seed=2)
    Blocks(copied).copy_from(kv.data_ptr(), blocks.layout, all_of_it, into)
    assert torch.equal(copied.view(torch.uint8), expected.view(torch.uint8))
    assert Blocks(copied).crc32(into) == blocks.crc32(all_of_it)
