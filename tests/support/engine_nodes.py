"""An engine with its peers' side, played by hand in one process: what the engine process does, without the process."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

from pdlab.core.prefix import chain
from pdlab.real.engine.engine import Engine
from pdlab.real.engine.load import load
from pdlab.real.engine.messages import AnyToEngine, Exported, FromEngine, Sampling, Step, Submit, Tokens
from pdlab.real.engine.options import EngineOptions
from pdlab.real.engine.runner import Runner
from pdlab.real.host.background import Background
from pdlab.real.instance.engine_process import EngineLoop
from pdlab.real.instance.kv_service import KvService
from pdlab.real.transfer.endpoint import KvEndpoint
from pdlab.real.transfer.rank_kv import RankedEndpoint, RankKv
from tests.support.rank_threads import RankThreads

T = TypeVar("T")
BLOCK = 4


class Line:
    """Stands where the socket to the other process is."""

    def __init__(self) -> None:
        self.inbox: queue.SimpleQueue[AnyToEngine | Callable[[], None]] = queue.SimpleQueue()
        self.sent: list[FromEngine] = []

    def send(self, message: FromEngine) -> None:
        self.sent.append(message)


class Node:
    """`followers` are the runners of the ranks from 1 on."""

    def __init__(self, name: str, engine: Engine, kv_service: KvService, line: Line, followers: tuple[Runner, ...] = ()) -> None:
        self.name, self.engine, self.kv_service, self.line, self.followers = name, engine, kv_service, line, followers
        self.serving = EngineLoop(line, engine, kv_service)  # type: ignore[arg-type]

    @property
    def descriptor(self) -> bytes:
        return self.kv_service.endpoint.descriptor()

    def turn(self) -> None:
        """Take in what has come, then run one pass or run."""
        while not self.line.inbox.empty():
            self.serving.take(self.line.inbox.get())
        if self.serving.left_s() == 0.0:
            self.serving.take(self.serving.deadlines)
        if self.engine.runnable:
            self.serving.mark_s = time.monotonic()
            self.engine.step(self.serving.mark_s, self.serving.emit, self.serving.interrupted)
        self.engine.worker.check()

    def tell(self, message: AnyToEngine) -> None:
        self.line.inbox.put(message)

    @property
    def outputs(self) -> list[Tokens]:
        return [output for step in self.line.sent if isinstance(step, Step) for output in step.outputs]

    def tokens(self, id: int, candidate: int = 0) -> list[int]:
        """Those that were told, which must have no gap or repeat."""
        found: list[int] = []
        start: int | None = None
        for output in self.outputs:
            if (output.id, output.candidate) == (id, candidate) and output.tokens:
                start = output.start if start is None else start
                assert output.start == start + len(found)
                found += output.tokens
        return found

    def finish(self, id: int, candidate: int = 0) -> str | None:
        ends = [o.finish for o in self.outputs if (o.id, o.candidate) == (id, candidate) and o.finish]
        assert len(ends) <= 1, f"{id} ended {ends}"
        return ends[0] if ends else None

    def error(self, id: int) -> str:
        return next(o.error for o in self.outputs if o.id == id and o.finish == "error")

    def news(self, kind: type[T], id: int) -> list[T]:
        said = [one for step in self.line.sent if isinstance(step, Step) for one in step.news]
        return [one for one in said if isinstance(one, kind) and one.id == id]  # type: ignore[attr-defined]

    def exported(self, call: int) -> Exported | None:
        return next((m for m in self.line.sent if isinstance(m, Exported) and m.call == call), None)

    def at_rest(self) -> None:
        assert self.engine.scheduler.idle
        assert self.engine.scheduler.pool.used == 0
        assert not self.kv_service.receiving.inbound
        assert not self.kv_service.lending.lent
        assert not self.kv_service.lending.leases
        assert not self.kv_service.lending.pushes.live


def until(met: Callable[[], T | None], *nodes: Node, within_s: float = 120.0) -> T:
    """Let the nodes run until that is true; returns it."""
    deadline_s = time.monotonic() + within_s
    while not (found := met()):
        assert time.monotonic() < deadline_s, "it never came"
        for node in nodes:
            node.turn()
        time.sleep(0.0005)
    return found


@contextmanager
def node(name: str, options: EngineOptions, *, transport: str = "auto", lease_s: float = 30.0) -> Iterator[Node]:
    with ExitStack() as stack:
        ranks = RankThreads(options, stack) if options.tp > 1 else None
        loaded = load(options) if ranks is None else ranks.loaded
        line = Line()
        ended: list[KvService] = []
        kind = KvEndpoint if ranks is None else RankedEndpoint

        def opened(endpoint: KvEndpoint, own: str) -> Background:
            background = Background(own)
            stack.callback(background.close)
            background.run(endpoint.start())
            stack.callback(lambda: background.run(endpoint.close()))
            return background

        given: dict[str, Any] = {
            "incarnation": "1",
            "block_tokens": options.block_tokens,
            "model_hash": loaded.fingerprint,
            "transport": transport,
            "checksums": True,
            "tp": options.tp,
            "kv_heads": loaded.config.kv_heads,
        }
        endpoint = kind(
            loaded.engine.runner.kv,
            name=name,
            lease_read=lambda lease, blocks: ended[0].lease_read(lease, blocks),
            leases_renewed=lambda leases, lease_s: ended[0].leases_renewed(leases, lease_s),
            **given,
        )
        if isinstance(endpoint, RankedEndpoint) and ranks is not None:
            others: dict[int, RankKv] = {}
            for rank, runner in sorted(ranks.runners.items()):
                one = KvEndpoint(runner.kv, name=f"{name}.{rank}", rank=rank, **given)
                others[rank] = RankKv(one, opened(one, f"{name}.{rank}"), endpoint.came)  # type: ignore[arg-type]
            endpoint.lead([each.endpoint.descriptor() for each in others.values()], lambda rank, message: others[rank].take(message))
        background = opened(endpoint, name)
        ended.append(KvService(loaded.engine, endpoint, background, line.inbox.put, engine_id=f"{name}-1", lease_s=lease_s))
        yield Node(name, loaded.engine, ended[0], line, () if ranks is None else tuple(ranks.runners.values()))


def submit(id: int, prompt: list[int], sampling: Sampling, *, decodes_here: bool = True, block: int = BLOCK) -> Submit:
    return Submit(id, prompt, sampling, chain(prompt, block), decodes_here=decodes_here)
