"""Sends a workload to a server: open loop by an absolute schedule, closed loop, and conversations whose turns wait for each other.

Bodies are made before they are due, so that a long prompt's JSON delays no arrival.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec

from pdlab.core.types import Request, Stage
from pdlab.proof.bench.overhead import Overhead
from pdlab.proof.bench.prompts import Prompts
from pdlab.proof.bench.server import TIMELINE, BenchServer, fields
from pdlab.proof.bench.stream import TimedStream, said
from pdlab.real.net.http import Broken, HttpClient
from pdlab.results.timeline import Book, Timeline
from pdlab.workload.base import Workload

NAN = math.nan
AHEAD = 64  # bodies made before they are due
_LEAD_S = 0.002  # nearer than that to the next arrival, nothing else is begun
_SOON_S = 0.05  # from the start of the clock to the first arrival


class Load:
    """One run. `raw(line)` is given a JSON object for each request: when it was sent and when its chunks came."""

    def __init__(
        self,
        client: HttpClient,
        server: BenchServer,
        workload: Workload,
        prompts: Prompts,
        *,
        timeout_s: float,
        raw: Callable[[bytes], object] | None = None,
    ) -> None:
        self.client, self.server, self.workload, self.prompts = client, server, workload, prompts
        self._sessions = workload.sessions()
        self.timeout_s, self._raw = timeout_s, raw
        self.book, self.overhead = Book(), Overhead()
        self.gaps = self.book.gaps
        self.ended = self.other_lengths = 0
        self.timelines = 0  # requests of which the server told its part
        self.duration_s = 0.0
        self._zero_s = 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        self._all = asyncio.Event()
        self._broken: BaseException | None = None
        self._followers: dict[int, list[int]] = {}
        self._waiting = iter(range(0))

    @property
    def zero_s(self) -> float:
        """When the run began, by `time.perf_counter`."""
        return self._zero_s

    @property
    def now_s(self) -> float:
        """Seconds since the run began."""
        return time.perf_counter() - self._zero_s

    async def run(self, stop: asyncio.Event) -> bool:
        """Until every request has ended, or `stop`: then what runs is cut off and written down as it is. True where all ended."""
        workload = self.workload
        if workload.after is not None:
            for index, earlier in enumerate(workload.after.tolist()):
                if earlier >= 0:
                    self._followers.setdefault(earlier, []).append(index)
        begin = self._open() if workload.concurrency is None else self._closed(workload.concurrency)
        opening = asyncio.create_task(begin)
        ends = [asyncio.create_task(event.wait()) for event in (self._all, stop)]
        try:
            await asyncio.wait([*ends, opening], return_when=asyncio.FIRST_COMPLETED)
            if opening.done():
                opening.result()
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            running = [opening, *ends, *self._tasks]
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            if not self._all.is_set():
                self.duration_s = self.now_s
        if self._broken is not None:
            raise self._broken
        return self._all.is_set()

    async def _open(self) -> None:
        workload = self.workload
        opening = range(len(workload)) if workload.after is None else [i for i, earlier in enumerate(workload.after) if earlier < 0]
        coming = iter(opening)
        made = deque((i, *self._made(i)) for i in itertools.islice(coming, AHEAD))
        self._start(_SOON_S)
        while made:
            index, prompt, body = made.popleft()
            due_s = float(workload.arrival_s[index])
            while (wait_s := due_s - self.now_s) > 0.0:
                if len(made) < AHEAD and wait_s > _LEAD_S and (following := next(coming, None)) is not None:
                    made.append((following, *self._made(following)))
                    await asyncio.sleep(0)
                else:
                    await asyncio.sleep(wait_s)
            self._send(index, prompt, body, due_s)
            if not made and (following := next(coming, None)) is not None:
                made.append((following, *self._made(following)))
            await asyncio.sleep(0)

    async def _closed(self, concurrency: int) -> None:
        first = min(concurrency, len(self.workload))
        self._waiting = iter(range(first, len(self.workload)))
        made = [self._made(i) for i in range(first)]
        self._start(0.0)
        for index, (prompt, body) in enumerate(made):
            self._send(index, prompt, body, 0.0)

    def _start(self, in_s: float) -> None:
        self.overhead.began()
        self._zero_s = time.perf_counter() + in_s

    async def _follow(self, index: int, due_s: float) -> None:
        prompt, body = self._made(index)
        while (wait_s := due_s - self.now_s) > 0.0:
            await asyncio.sleep(wait_s)
        await self._one(index, prompt, body, due_s)

    def _send(self, index: int, prompt: list[int], body: bytes, due_s: float) -> None:
        self._spawn(self._one(index, prompt, body, due_s))

    def _spawn(self, what: Any) -> None:
        task = asyncio.create_task(what)
        self._tasks.add(task)
        task.add_done_callback(self._over)

    def _over(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._broken = task.exception()
            self._all.set()

    def _made(self, index: int) -> tuple[list[int], bytes]:
        """A request's prompt, and all its bytes."""
        prompt, request = self.prompts.tokens(index), self._request(index, 0.0)
        asked = {**fields(prompt, int(self.workload.output_tokens[index]), request.best_of), **extras(request)}
        return prompt, self.client.request(b"POST", b"/v1/completions", self.server.body(asked), TIMELINE)

    async def _one(self, index: int, prompt: list[int], body: bytes, due_s: float) -> None:
        sent_s = self.now_s
        self.overhead.sent_late_s.append(sent_s - due_s)
        request, stream = self._request(index, sent_s), TimedStream(self.gaps.add, self._raw is not None)
        stage, reason = Stage.DONE, None
        try:
            async with asyncio.timeout(self.timeout_s):
                stream.status = await self.client.stream(body, stream.take)
            stage, reason = _judged(stream, request.best_of)
        except TimeoutError:
            stage, reason = Stage.EXPIRED, f"no whole answer within {self.timeout_s:g} s"
        except Broken as error:
            stage, reason = Stage.FAILED, str(error)
        except asyncio.CancelledError:
            self._write(request, stream, Stage.DECODE if stream.counted else Stage.QUEUED_P, None)
            raise
        if stage is Stage.DONE and stream.output and request.best_of == 1:
            self.prompts.answered(index, prompt, stream.output)
        self._write(request, stream, stage, reason)
        self._after(index)

    def _write(self, request: Request, stream: TimedStream, stage: Stage, reason: str | None) -> None:
        done, now_s = stage is Stage.DONE, self.now_s
        tokens = stream.tokens if done else stream.counted
        if done:
            self.other_lengths += tokens != int(self.workload.output_tokens[request.id]) * request.best_of
        self.overhead.chunks += stream.chunks
        self.overhead.tokens += tokens
        line = Timeline(request)
        line.attempts, line.cached_tokens, line.received_tokens = 1, stream.cached_tokens, tokens
        if stream.timeline:
            self.timelines += 1
            line.follow(stream.timeline)
        line.first_token(stream.first_s - self._zero_s)
        line.ended(stage, stream.last_s - self._zero_s if done else now_s if stage.ended else NAN, reason)
        self.book.write(line)
        self.book.records.first_tokens.append(stream.first_tokens)
        if self._raw is not None:
            chunks = [(when - self._zero_s, choice, count) for when, choice, count in stream.times or ()]
            raw = {"request_id": request.id, "sent_s": request.arrival_s, "status": stage.name.lower(), "chunks": chunks}
            self._raw(msgspec.json.encode(raw) + b"\n")

    def _after(self, index: int) -> None:
        """What the end of a request sets off."""
        self.ended += 1
        self.duration_s = self.now_s
        for turn in self._followers.pop(index, ()):
            self._spawn(self._follow(turn, self.duration_s + float(self.workload.arrival_s[turn])))
        if (following := next(self._waiting, None)) is not None:
            self._spawn(self._follow(following, self.duration_s))
        if self.ended == len(self.workload):
            self._all.set()

    def _request(self, index: int, arrival_s: float) -> Request:
        workload = self.workload

        def own(column: Any) -> float | None:
            return None if column is None or math.isnan(column[index]) else float(column[index])

        n = 1 if workload.n is None else int(workload.n[index])
        return Request(
            index,
            arrival_s,
            int(workload.prompt_tokens[index]),
            priority=0 if workload.priority is None else int(workload.priority[index]),
            ttft_slo_s=own(workload.ttft_slo_s),
            tpot_slo_s=own(workload.tpot_slo_s),
            n=n,
            best_of=max(n, 1 if workload.best_of is None else int(workload.best_of[index])),
            **workload.labels(index, self._sessions),
        )


def extras(request: Request) -> dict[str, Any]:
    """Priority and objectives, session, tenant and class, where it has any. vLLM puts the lowest number first, pdlab the highest: pdlab's
    is sent."""
    found: dict[str, Any] = {"priority": request.priority} if request.priority else {}
    for name, seconds in (("ttft_slo_ms", request.ttft_slo_s), ("tpot_slo_ms", request.tpot_slo_s)):
        if seconds is not None:
            found[name] = seconds * 1e3
    if request.session:
        found["session_id"] = request.session
    if request.tenant:
        found["user"] = request.tenant
    if request.offline:
        found["service_tier"] = "flex"
    return found


def _judged(stream: TimedStream, sequences: int) -> tuple[Stage, str | None]:
    """How a request ended, of which an answer came."""
    if stream.status in (429, 503):
        return Stage.REJECTED, f"status {stream.status}: {said(stream.content)}"
    if stream.status != 200:
        return Stage.FAILED, f"status {stream.status}: {said(stream.content)}"
    if stream.error is not None:
        return Stage.FAILED, stream.error
    if not stream.events and stream.content:
        packed = stream.content.startswith(b"\x1f\x8b")
        return Stage.FAILED, f"no stream of events: {'packed with gzip, which was not asked for' if packed else said(stream.content)}"
    if not stream.counted or (len(stream.finished) < sequences and not stream.done):
        return Stage.FAILED, "the answer ended early"
    return Stage.DONE, None
