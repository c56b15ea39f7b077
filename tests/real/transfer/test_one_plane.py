"""KV memory of one plane (MLA: one head, no values beside its keys) moves as that of two does, and only between its like."""

from __future__ import annotations

import asyncio

import pytest
import torch

from pdlab.real.transfer.shared import shared_kv
from tests.real.transfer.peer import BLOCK_TOKENS, endpoint
from tests.real.transfer.ways import NIXL

SOURCE, TARGET = [7, 3, 4, 5, 19, 0], [1, 15, 16, 9, 2, 20]


def latent_memory(seed: int, *, planes: int = 1) -> torch.Tensor:
    kv = shared_kv((3, planes, 24, 1, BLOCK_TOKENS, 576), torch.float32)
    return kv.copy_(torch.randn(kv.shape, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("transport", ["tcp", "shm", NIXL])
def test_a_latent_arrives_whole_and_by_layer(transport: str) -> None:
    here, there = latent_memory(1), latent_memory(2)
    expected = here.clone()

    async def go() -> None:
        async with endpoint(here, transport) as own, endpoint(there, transport, name="there") as peer:
            peer.offer("whole", SOURCE)
            expected[:, :, TARGET] = there[:, :, SOURCE]
            result = await own.pull(peer.descriptor(), "whole", SOURCE, TARGET, deadline_s=30)
            assert (result.status, result.bytes) == ("done", len(SOURCE) * 3 * BLOCK_TOKENS * 576 * 4)
            assert torch.equal(here, expected)
            peer.offer("a layer", [9])
            expected[1:2, :, 22] = there[1:2, :, 9]
            assert (await own.pull(peer.descriptor(), "a layer", [9], [22], layers=(1, 2), deadline_s=30)).status == "done"
            assert torch.equal(here, expected)

    asyncio.run(go())


def test_keys_with_values_are_no_latent() -> None:
    async def go() -> None:
        async with endpoint(latent_memory(1), "tcp") as own, endpoint(latent_memory(2, planes=2), "tcp", name="there") as peer:
            peer.offer("whole", SOURCE)
            result = await own.pull(peer.descriptor(), "whole", SOURCE, TARGET, deadline_s=30)
            assert result.status == "failed"
            assert "planes 1 at here and 2 at there" in result.reason

    asyncio.run(go())
