"""An engine in this process, run as the engine process runs it: scheduler, model, sampler, and the news encoded after every pass.

Sequences are put in place as if their KV had come from elsewhere, so that a decode of long contexts or a chunk after cached tokens needs no
prefill first. What they attend to is noise, which takes as long to read as anything.

The clock is the wall's, or this thread's CPU time: of an engine of one thread, what its steps would take if nobody else used the machine.
"""

from __future__ import annotations

import queue
import random
import time
from collections.abc import Callable
from itertools import count
from statistics import median
from typing import cast

import msgspec
import torch

from pdlab.core.prefix import chain
from pdlab.cost.profile import Point
from pdlab.proof.calibrate.grid import Bounds
from pdlab.real.engine.handover import Handover
from pdlab.real.engine.load import Loaded
from pdlab.real.engine.messages import AnyToEngine, FromEngine, Sampling, Submit, Tokens
from pdlab.real.instance.engine_process import EngineLoop, Link

WARM, PASSES = 1, 5  # decode steps of one repeat: left out, and timed


class NullSocket:
    """Stands where the socket to the HTTP process is: what is sent is encoded, and dropped."""

    def __init__(self) -> None:
        self.inbox: queue.SimpleQueue[AnyToEngine | Callable[[], None]] = queue.SimpleQueue()
        self.outbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self.encoder = msgspec.msgpack.Encoder()

    def send(self, message: FromEngine) -> None:
        self.outbox.put(self.encoder.encode(message))


class Bench:
    """Times single steps of `loaded`'s engine."""

    def __init__(self, loaded: Loaded, *, temperature: float = 0.0, clock: Callable[[], float] = time.perf_counter, seed: int = 0) -> None:
        self.clock = clock
        self.engine = loaded.engine
        self.device = loaded.device
        self.line = NullSocket()
        self.serving = EngineLoop(cast(Link, self.line), self.engine, None)
        self.exchange = Handover(self.engine)
        self.random = random.Random(seed)
        self.numbers = count(1)
        self.first_longer_s: dict[int, float] = {}  # by tokens of a step with prompts, how much the first took longer than the second
        self.sampling = Sampling(max_tokens=WARM + PASSES + 8, ignore_eos=True, temperature=temperature)
        kv = self.engine.runner.kv
        for layer in kv:  # touched, and not all the same page of zeros
            layer.uniform_(-0.1, 0.1)

    @property
    def bounds(self) -> Bounds:
        scheduler = self.engine.scheduler
        return Bounds(scheduler.max_batch_tokens, scheduler.max_seqs, self.engine.worker.most_tokens, scheduler.most_tokens - 1)

    def seconds(self, point: Point) -> float:
        """One repeat of a point, of a size that was run before."""
        size = point.tokens * point.prompts + point.batch
        if point.tokens and size not in self.first_longer_s:
            first_s, second_s = self._once(point), self._once(point)
            self.first_longer_s[size] = first_s - second_s
            return second_s
        return self._once(point)

    @property
    def new_size_s(self) -> float:
        """How much longer the first step of a size takes than those that follow, by those that were seen."""
        return max(0.0, median(self.first_longer_s.values() or [0.0]))

    def _once(self, point: Point) -> float:
        try:
            return self._decode(point) if not point.tokens else self._chunks(point)
        finally:
            self._clear()

    def _decode(self, point: Point) -> float:
        """The mean of a few steps, the middle one of which has the point's context."""
        self._run(point.batch, point.context - WARM - PASSES // 2)
        stamps: list[float] = []

        def emit(outputs: list[Tokens]) -> None:
            self.serving.emit(outputs)
            self._wait()
            stamps.append(self.clock())

        while len(stamps) < WARM + PASSES:
            self.engine.step(time.monotonic(), emit, lambda: len(stamps) >= WARM + PASSES - 1)
        return (stamps[-1] - stamps[WARM - 1]) / PASSES

    def _chunks(self, point: Point) -> float:
        """A step of the point's prompts, which all end in it or none, beside its decodes."""
        if point.batch:
            self._run(point.batch, point.context - 1)
            self.engine.step(time.monotonic(), self.serving.emit, lambda: True)
        left = 0 if point.ends else 1
        for _ in range(point.prompts):
            self._place(point.tokens + point.cached + left, missing=point.tokens + left)
        scheduler = self.engine.scheduler
        most = scheduler.max_batch_tokens
        if left:
            scheduler.max_batch_tokens = point.tokens
        try:
            self._wait()
            began_s = self.clock()
            self.engine.step(time.monotonic(), self.serving.emit, lambda: True)
            self._wait()
            return self.clock() - began_s
        finally:
            scheduler.max_batch_tokens = most

    def _run(self, batch: int, context: int) -> None:
        """`batch` sequences that decode next with `context` tokens each."""
        for _ in range(batch):
            self._place(max(1, context - 1), missing=0)

    def _place(self, tokens: int, missing: int) -> None:
        """A sequence of which the last `missing` prompt tokens are still to compute; none: it decodes."""
        vocab = self.engine.runner.model.config.vocab
        prompt = [self.random.randrange(vocab) for _ in range(tokens)]
        submit = Submit(next(self.numbers), prompt, self.sampling, chain(prompt, self.engine.runner.block_tokens))
        place = self.exchange.receive(submit, [] if missing else [prompt[-1]], time.monotonic())
        assert place is not None, f"no room for {tokens} tokens"
        self.engine.worker.arrive(self.engine.groups[submit.id][0].seq, missing)

    def _clear(self) -> None:
        for id in list(self.engine.groups):
            self.engine.cancel(id)
        self.engine.news.clear()
        while not self.line.outbox.empty():
            self.line.outbox.get()

    def _wait(self) -> None:
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize(self.device)
