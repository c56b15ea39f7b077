"""A registry over TLS that is closed leaves no socket behind: a peer's goodbye may never come, and nobody waits for it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import warnings
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from pdlab.real.net.tls import Tls
from pdlab.real.registry import open_registry
from pdlab.real.registry.store import StoreAway
from tests.real.registry.conftest import missing
from tests.real.registry.test_tls import QUOTED, process, redis_command
from tests.support import certificates


def left_behind(main: Callable[[], Coroutine[Any, Any, None]]) -> list[str]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        asyncio.run(main())
        gc.collect()
    return [str(one.message) for one in seen if issubclass(one.category, ResourceWarning)]


@pytest.mark.skipif(bool(missing("redis")), reason=missing("redis"))
def test_calls_that_are_given_up_over_tls_leave_no_socket(tmp_path: Path) -> None:
    certs = certificates.make(tmp_path)
    command, ready, at = redis_command(tmp_path, certs)
    with process(command, ready) as server:

        async def main() -> None:
            registry = await open_registry(f"rediss://me:{QUOTED}@{at}", timeout_s=1.0, tls=Tls(ca_certs=str(certs.ca)))
            server.send_signal(signal.SIGSTOP)
            try:
                asked = [asyncio.create_task(registry.store.snapshot()) for _ in range(3)]
                await asyncio.sleep(0.05)
                for one in asked:
                    one.cancel()
                await asyncio.gather(*asked, return_exceptions=True)
                with contextlib.suppress(StoreAway):
                    await registry.close()
            finally:
                server.send_signal(signal.SIGCONT)

        assert not left_behind(main)
