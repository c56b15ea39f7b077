"""Instances that end before they are ready."""

from __future__ import annotations

import asyncio
import os
import socket
import sys

import pytest

from pdlab.core.types import UsageError
from pdlab.real.launch import child_instances as children
from pdlab.real.launch.child_instances import Children
from pdlab.real.registry.child_registry import ParentStore, answer
from pdlab.real.registry.memory import MemoryStore


def command(fd: int) -> list[str]:
    return [sys.executable, "-S", "-c", "raise SystemExit(3)"]


def test_one_that_the_cluster_begins_with_must_start() -> None:
    async def main() -> None:
        made = Children(MemoryStore())
        made.add("decode-0", command)
        with pytest.raises(UsageError, match="decode-0 has ended with status 3 before it was ready; what it said is above"):
            await made.failed
        await made.close()

    asyncio.run(main())


def test_one_that_a_policy_has_asked_for_is_tried_again_ever_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "AGAIN_S", 0.01)

    async def main() -> None:
        said: list[str] = []
        thrice = asyncio.Event()

        def say(line: str) -> None:
            said.append(line)
            if len(said) == 3:
                thrice.set()

        made = Children(MemoryStore(), say=say)
        made.add("decode-1", command, needed=False)
        await thrice.wait()
        assert not made.failed.done()
        await made.close()
        assert said == [f"decode-1 has ended with status 3: starting it again in {s} s" for s in ("0.01", "0.02", "0.04")]

    asyncio.run(main())


def test_the_registry_of_a_parent_is_for_processes_of_its_user(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        theirs, ours = socket.socketpair()
        with theirs, monkeypatch.context() as changed:
            changed.setattr(os, "geteuid", lambda: os.getuid() + 1)
            assert await answer(MemoryStore(), ours) == 0 and theirs.recv(1) == b""
            child, parent = socket.socketpair()
            with parent, pytest.raises(UsageError, match="the two ends run as users"):
                await ParentStore.connect(child.detach())
        with pytest.raises(UsageError, match="--registry fd://999: Bad file descriptor"):
            await ParentStore.connect(999)

    asyncio.run(main())
