"""A stand-in for an engine that exchanges KV: a shelf of leases stands for the memory, and others' shelves for the network."""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import Any

import msgspec

from pdlab.core.types import Report
from pdlab.real.engine.messages import (
    Exported,
    FromQueue,
    Full,
    Held,
    Landed,
    Proceed,
    Receive,
    Reserved,
    Resume,
    Source,
    Staged,
    Step,
    Submit,
    Tokens,
)
from pdlab.real.instance.engine_client import load_report
from tests.support.echo_engine import BLOCK, CONTEXT, EchoEngine, Sequence

GEOMETRY = {"layers": 2, "kv_heads": 1, "block_tokens": BLOCK, "head_dim": 8, "dtype": "float32", "model_hash": "m"}
SHELVES: dict[str, KvEngine] = {}  # by descriptor


def descriptor(name: str, **other: Any) -> bytes:
    found = {"name": name, "incarnation": "1", "host": "h", "geometry": GEOMETRY | other, "blocks": 10_000}
    return msgspec.json.encode(found)


class KvEngine(EchoEngine):
    """What it has leased lies on its shelf: lease -> (blocks, KV tokens, the request). `full`: no room to reserve. A prompt of n tokens
    has the blocks 100, 101, ...; `lost`: the next read fails."""

    def __init__(self, name: str, *, step_s: float = 0.0, context: int = CONTEXT) -> None:
        super().__init__(step_s=step_s, context=context)
        self.ready = msgspec.structs.replace(self.ready, descriptor=descriptor(name), engine_id=f"engine-{name}", block_bytes=64)
        self.name = name
        self.shelf: dict[str, tuple[list[int], int, Sequence]] = {}
        self.inbound: dict[int, tuple[Receive, asyncio.Queue[FromQueue]]] = {}
        self.moving: dict[int, Sequence] = {}
        self.heard: list[Any] = []
        self.full = False
        self.lost = ""
        self.deadlines: dict[int, asyncio.TimerHandle] = {}
        self.stored: tuple[int, ...] = ()
        self.evicted: tuple[int, ...] = ()
        self.numbers = itertools.count(1)
        SHELVES[self.ready.descriptor.decode()] = self

    @property
    def load(self) -> Step:
        return self._load

    @load.setter
    def load(self, load: Step) -> None:
        self._load = load
        self.on_load()

    def on_load(self) -> None: ...

    def lease(self, one: Sequence, kv_tokens: int) -> tuple[str, list[int]]:
        name, blocks = f"{self.name}-lease-{next(self.numbers)}", list(range(100, 100 - -kv_tokens // BLOCK))
        self.shelf[name] = blocks, kv_tokens, one
        self._tell()
        return name, blocks

    @property
    def leases(self) -> int:
        return len(self.shelf)

    def finished(self, one: Sequence, finish: str | None) -> str | None:
        """A prompt that does not stay is held after its first token."""
        if one.submit.decodes_here or finish == "stop":
            return finish
        if one.submit.push is None:
            lease, blocks = self.lease(one, len(one.submit.tokens))
            one.arriving.put_nowait(Held(one.submit.id, lease, blocks, len(one.submit.tokens)))
        return "held"

    def receive(self, receive: Receive, arriving: asyncio.Queue[FromQueue]) -> None:
        self.heard.append(receive)
        id = receive.submit.id
        if self.down is not None:
            arriving.put_nowait(Tokens(id, 0, 0, [], "error", error=self.down))
        elif self.full:
            arriving.put_nowait(Full(id, "no KV blocks are free"))
        else:
            self.inbound[id] = receive, arriving
            tokens = len(receive.submit.tokens) + len(receive.made)
            arriving.put_nowait(Reserved(id, "" if receive.source else f"ticket-{id}", list(range(7, 7 - -tokens // BLOCK)), BLOCK))
            loop = asyncio.get_running_loop()
            self.deadlines[id] = loop.call_later(receive.deadline_s, self.fail, id, f"nothing came within {receive.deadline_s} s")
            if receive.source is not None:
                loop.call_soon(self.read, id, receive.made, receive.source, receive.last)

    def proceed(self, proceed: Proceed) -> None:
        self.heard.append(proceed)
        if proceed.id not in self.inbound:
            return
        if proceed.source is not None:
            asyncio.get_running_loop().call_soon(self.read, proceed.id, proceed.made, proceed.source, proceed.last)
        else:
            self.land(proceed.id, proceed.made, 0)

    def read(self, id: int, made: list[int], source: Source, last: bool) -> None:
        there = SHELVES.get(source.descriptor.decode())
        if self.lost or there is None or source.lease not in there.shelf:
            self.fail(id, self.lost or f"lease {source.lease} has ended")
            return
        if id not in self.inbound:
            return
        blocks, _, one = there.shelf.pop(source.lease)
        assert blocks == source.blocks
        there._tell()
        if there.moving.pop(one.submit.id, None) is not None:
            one.arriving.put_nowait(Tokens(*one.key, one.made, [], "moved"))
        if last:
            self.land(id, made, len(blocks) * 64)
        else:
            self.inbound[id][1].put_nowait(Staged(id))

    def land(self, id: int, made: list[int], bytes: int) -> None:
        receive, arriving = self.inbound.pop(id)
        self.deadlines.pop(id).cancel()
        arriving.put_nowait(Landed(id, bytes, 0.01, "shm", len(made), waited_s=0.002))
        self.start(receive.submit, arriving, len(made))

    def fail(self, id: int, reason: str) -> None:
        if (known := self.inbound.pop(id, None)) is not None:
            self.deadlines.pop(id).cancel()
            for candidate in range(known[0].submit.sampling.best_of):
                known[1].put_nowait(Tokens(id, candidate, len(known[0].made), [], "error", error=reason))

    def cancel(self, id: int, candidate: int = -1) -> None:
        if id in self.inbound:
            self.cancelled.append((id, candidate))
            self.inbound.pop(id)
            self.deadlines.pop(id).cancel()
            return
        self.moving.pop(id, None)
        super().cancel(id, candidate)

    def die(self, reason: str) -> None:
        self.down = reason
        for id in list(self.inbound):
            self.fail(id, reason)
        super().die(reason)

    def resume(self, resume: Resume, arriving: asyncio.Queue[FromQueue]) -> None:
        self.heard.append(resume)
        if self.shelf.pop(resume.lease, None) is None:
            arriving.put_nowait(Tokens(resume.submit.id, 0, 0, [], "error", error=f"lease {resume.lease} has ended"))
            return
        arriving.put_nowait(Landed(resume.submit.id, 0, 0.0, "", len(resume.made)))
        self.start(resume.submit, arriving, len(resume.made))

    def release(self, lease: str) -> None:
        self.heard.append(("release", lease))
        self.shelf.pop(lease, None)
        self._tell()

    def renew(self, lease: str, lease_s: float = 30.0) -> None:
        self.heard.append(("renew", lease, lease_s))

    async def lend(self, hashes: tuple[int, ...], lease_s: float = 30.0) -> Exported:
        return Exported(1)

    async def export(self, id: int, stop: bool = False, resume: bool = False, lease_s: float = 30.0) -> Exported:
        self.heard.append(("export", id, stop, resume))
        await asyncio.sleep(0)
        if resume:
            if (one := self.moving.pop(id, None)) is not None:
                self.live[one.key] = one
                self.wake()
            return Exported(1)
        if (one := self.live.get((id, 0))) is None:
            return Exported(1, "it does not run here")
        tokens = len(one.submit.tokens) + one.made - 1
        if stop:
            self.moving[id] = self.live.pop(one.key)
        else:
            tokens = tokens // BLOCK * BLOCK
        made = [one.submit.tokens[at % len(one.submit.tokens)] for at in range(one.made)]
        lease, blocks = self.lease(one, tokens)
        return Exported(1, "", lease, blocks, tokens, made)

    def report(self, name: str, incarnation: int) -> Report:
        found = msgspec.structs.replace(load_report(self.load, name, incarnation), stored=self.stored, evicted=self.evicted)
        self.stored = self.evicted = ()
        return found

    def timeline(self, id: int) -> dict[str, Any] | None:
        return {"id": id, "at_s": time.monotonic()}

    def start(self, submit: Submit, arriving: asyncio.Queue[FromQueue], made: int) -> None:
        for candidate in range(submit.sampling.best_of):
            one = self.live[submit.id, candidate] = Sequence(submit, candidate, arriving)
            one.made = one.given = made
        self.wake()
