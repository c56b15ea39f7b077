"""The HTTP process's end: starts the engine process, sends it requests, and hands each request its tokens."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import subprocess
import time
from collections.abc import Callable

import msgspec

from pdlab.core.report import keep_recent
from pdlab.core.types import Report, StepTime, UsageError
from pdlab.real.engine.messages import (
    FROM_ENGINE,
    AnyFromEngine,
    AskLease,
    Cancel,
    Compile,
    Compiled,
    EngineBroken,
    Export,
    Exported,
    FromQueue,
    Full,
    Holds,
    Lend,
    Loading,
    News,
    Proceed,
    Ready,
    Receive,
    Release,
    RenewLease,
    Resume,
    Step,
    StopEngine,
    StructuredOutputs,
    Submit,
    ToEngine,
    Tokens,
    Vocabulary,
)
from pdlab.real.engine.options import EngineOptions
from pdlab.real.host.processes import MODULE
from pdlab.real.instance.followers import environment

Answered = Exported | Holds | Compiled


class EngineClient:
    """An engine in a process of its own. `await EngineClient.start(options)`, then `submit`, `cancel`, and in the end `await close()`."""

    def __init__(self, process: subprocess.Popen[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.process = process
        self.ready: Ready
        self.load = Step([])
        self.down: str | None = None
        self.on_load: Callable[[], None] = lambda: None
        self._reader, self._writer = reader, writer
        self._encoder = msgspec.msgpack.Encoder()
        self._queues: dict[int, tuple[asyncio.Queue[FromQueue], set[int]]] = {}
        self._calls: dict[int, asyncio.Future[Answered | None]] = {}
        self._numbers = itertools.count(1)
        self._cache: dict[int, bool] = {}  # prefix hashes since the last report: stored, or evicted
        self._recent: dict[int, StepTime] = {}  # steps since then, as `Meter.recent`
        self._listening: asyncio.Task[None] | None = None
        self._vocabulary: Vocabulary | None = None  # as told

    @classmethod
    async def start(cls, options: EngineOptions, loading: Callable[[str], None] = lambda stage: None) -> EngineClient:
        """Start the process and wait until its model is loaded; `loading` is told of each stage. Raises UsageError where the engine finds a
        mistake of the user's."""
        ours, theirs = socket.socketpair()
        for sock in (ours, theirs):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)
        command = [*MODULE, "pdlab.real.instance.engine_process", str(theirs.fileno())]
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment(options))
        theirs.close()
        raw = msgspec.msgpack.encode(options)  # a secret is among them, and a command line is read by anybody
        ours.sendall(len(raw).to_bytes(4, "little") + raw)
        reader, writer = await asyncio.open_connection(sock=ours, limit=1 << 24)
        client = cls(process, reader, writer)
        try:
            while isinstance(first := await client._receive(), Loading):
                loading(first.stage)
        except BaseException:
            await client.close()
            raise
        if isinstance(first, Ready):
            client.ready = first
            client.load = Step([], Report("", free_blocks=first.kv_blocks))
            client._listening = asyncio.create_task(client._listen())
            return client
        await client.close()
        if isinstance(first, EngineBroken) and first.usage:
            raise UsageError(first.reason)
        reason = first.reason if isinstance(first, EngineBroken) else f"exit status {process.returncode}"
        raise UsageError(f"the engine process did not start: {reason}")

    def submit(self, submit: Submit, arriving: asyncio.Queue[FromQueue] | None = None) -> asyncio.Queue[FromQueue]:
        """All candidates' tokens arrive in the queue, each one's last with `finish` set. Several requests may share a given queue."""
        arriving = asyncio.Queue() if arriving is None else arriving
        self._begin(submit, submit, arriving)
        return arriving

    def receive(self, receive: Receive, arriving: asyncio.Queue[FromQueue]) -> None:
        """The queue brings Reserved (or Full, which ends it), Staged and Landed, then the tokens."""
        self._begin(receive.submit, receive, arriving)

    def resume(self, resume: Resume, arriving: asyncio.Queue[FromQueue]) -> None:
        self._begin(resume.submit, resume, arriving)

    def proceed(self, proceed: Proceed) -> None:
        """Harmless when the request has ended."""
        if proceed.id in self._queues and self.down is None:
            self._send(proceed)

    def release(self, lease: str) -> None:
        if self.down is None:
            self._send(Release(lease))

    def renew(self, lease: str, lease_s: float = 30.0) -> None:
        if self.down is None:
            self._send(RenewLease(lease, lease_s))

    async def export(self, id: int, stop: bool = False, resume: bool = False, lease_s: float = 30.0) -> Exported:
        """Of an engine that is down, or ends meanwhile: an answer with `error`."""
        found = await self._call(Export(next(self._numbers), id, stop, resume, lease_s))
        return found if isinstance(found, Exported) else Exported(0, self.down or "no answer")

    async def lend(self, hashes: tuple[int, ...], lease_s: float = 30.0) -> Exported:
        """Likewise; without a lease where none of these blocks is cached."""
        found = await self._call(Lend(next(self._numbers), hashes, lease_s))
        return found if isinstance(found, Exported) else Exported(0, self.down or "no answer")

    async def leased(self, lease: str) -> bool:
        """Does it hold, with all that was asked before? An engine that is down, or ends meanwhile, holds nothing."""
        found = await self._call(AskLease(next(self._numbers), lease))
        return isinstance(found, Holds) and found.holds

    async def compile(self, structured: StructuredOutputs, vocabulary: Vocabulary) -> str:
        """Have a grammar ready for requests that follow: "" or why there is none, in one line. The vocabulary is told once."""
        if self.down is None and self._vocabulary is not vocabulary:
            self._vocabulary = vocabulary
            self._send(vocabulary)
        found = await self._call(Compile(next(self._numbers), structured))
        return found.reason if isinstance(found, Compiled) else self.down or "no answer"

    def report(self, name: str, incarnation: int) -> Report:
        """The load after the last step; with the changes of the prefix cache, and some of the steps, since the last call."""
        cache, self._cache = self._cache, {}
        recent, self._recent = self._recent, {}
        stored = tuple(hash for hash, here in cache.items() if here)
        evicted = tuple(hash for hash, here in cache.items() if not here)
        load = load_report(self.load, name, incarnation)
        return msgspec.structs.replace(load, stored=stored, evicted=evicted, steps=tuple(recent.values()))

    def cancel(self, id: int, candidate: int = -1) -> None:
        """Drop a request or one of its candidates; its last tokens, with finish "abort", still arrive."""
        if id in self._queues and self.down is None:
            self._send(Cancel(id, candidate))

    async def close(self) -> None:
        """End the process: in order, and where it does not answer within 5 s, or still loads, by force."""
        if self._listening is None:
            self.process.kill()
        else:
            self._listening.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._listening
        if self.process.poll() is None:
            with contextlib.suppress(OSError):
                self._send(StopEngine())
        self._fail("the engine was stopped")
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()
        try:
            await asyncio.to_thread(self.process.wait, 5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            await asyncio.to_thread(self.process.wait)

    def _send(self, message: ToEngine) -> None:
        raw = self._encoder.encode(message)
        self._writer.write(len(raw).to_bytes(4, "little") + raw)

    async def _receive(self) -> AnyFromEngine | None:
        try:
            head = await self._reader.readexactly(4)
            message: AnyFromEngine = FROM_ENGINE.decode(await self._reader.readexactly(int.from_bytes(head, "little")))
            return message
        except (asyncio.IncompleteReadError, ConnectionError):
            await asyncio.to_thread(self.process.wait)
            return None

    async def _call(self, message: Export | AskLease | Lend | Compile) -> Answered | None:
        """Its answer; None of an engine that is down, or ends meanwhile."""
        if self.down is not None:
            return None
        answer: asyncio.Future[Answered | None] = asyncio.get_running_loop().create_future()
        self._calls[message.call] = answer
        try:
            self._send(message)
            return await answer
        finally:
            del self._calls[message.call]

    def _begin(self, submit: Submit, message: ToEngine, arriving: asyncio.Queue[FromQueue]) -> None:
        if self.down is not None:
            for index in range(submit.sampling.best_of):
                arriving.put_nowait(Tokens(submit.id, index, 0, [], "error", error=self.down))
            return
        self._queues[submit.id] = arriving, set(range(submit.sampling.best_of))
        self._send(message)

    async def _listen(self) -> None:
        while isinstance(message := await self._receive(), Step | Exported | Holds | Compiled):
            if isinstance(message, Exported | Holds | Compiled):
                if (answer := self._calls.get(message.call)) is not None and not answer.done():
                    answer.set_result(message)
                continue
            self.load = message
            self.on_load()
            self._note(message.report)
            for news in message.news:
                self._tell(news)
            for tokens in message.outputs:
                self._deliver(tokens)
        if isinstance(message, EngineBroken):
            self._fail(f"the engine has failed: {message.reason}")
        else:
            self._fail(f"the engine process has ended with status {self.process.returncode}")

    def _note(self, report: Report) -> None:
        """What the next report tells: where each prefix hash is now, and of the steps those worth telling."""
        self._cache.update(dict.fromkeys(report.stored, True))
        self._cache.update(dict.fromkeys(report.evicted, False))
        for step in report.steps:
            keep_recent(self._recent, step)

    def _tell(self, news: News) -> None:
        if (known := self._queues.get(news.id)) is None:
            return
        if isinstance(news, Full):
            del self._queues[news.id]
        known[0].put_nowait(news)

    def _deliver(self, tokens: Tokens) -> None:
        known = self._queues.get(tokens.id)
        if known is None:
            return
        arriving, open_candidates = known
        if tokens.finish is not None:
            open_candidates.discard(tokens.candidate)
            if not open_candidates:
                del self._queues[tokens.id]
        arriving.put_nowait(tokens)

    def _fail(self, reason: str) -> None:
        if self.down is None:
            self.down = reason
            self.on_load()
        for id, (arriving, open_candidates) in self._queues.items():
            for index in sorted(open_candidates):
                arriving.put_nowait(Tokens(id, index, 0, [], "error", error=reason))
        self._queues.clear()
        for answer in self._calls.values():
            if not answer.done():
                answer.set_result(None)


def load_report(step: Step, name: str, incarnation: int) -> Report:
    """What a router asks of an instance's load, without what is told once. Its clock is the wall's."""
    return msgspec.structs.replace(
        step.report, instance=name, incarnation=incarnation, taken_s=time.time(), stored=(), evicted=(), steps=()
    )
