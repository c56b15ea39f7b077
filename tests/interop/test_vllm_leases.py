"""What a vLLM server leases nobody but a decode server renews, and a pull after the lease reads whatever lies there then. Needs no vLLM."""

from __future__ import annotations

import asyncio

import pytest

from pdlab.core.types import InstanceSpec, Role
from pdlab.real.engine.messages import Sampling
from pdlab.real.router import http_remote as http
from pdlab.real.router.http_remote import HttpRemote
from pdlab.real.router.remote import LegAsk
from tests.support.fake_instance import Fake


def test_kv_that_waits_too_long_counts_as_lost_before_its_lease_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    async def play() -> None:
        async with Fake(vllm=True) as fake:
            remote = HttpRemote(InstanceSpec(name="p", role=Role.PREFILL, kv_blocks=9, url=fake.url, model="fake", engine="vllm"))
            try:
                found = await remote.prefill(LegAsk("p", 1, 1, [5, 6, 7], Sampling(max_tokens=4)))
                assert found.params is not None and found.params.remote_request_id
                assert await remote.renew(found.params.remote_request_id)
                monkeypatch.setattr(http, "UNRENEWED_S", 0.05)
                await asyncio.sleep(0.06)
                assert not await remote.renew(found.params.remote_request_id)
            finally:
                remote.close()
                await asyncio.sleep(0.01)

    asyncio.run(play())
