"""Where requests come from: arrivals in the open, loops that keep so many under way, and the turns of sessions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from pdlab.core.types import Arrived, Request
from pdlab.sim.after import After
from pdlab.sim.host import Host
from pdlab.sim.job import Job
from pdlab.sim.scene import Scene
from pdlab.workload.base import Workload


class RequestSource:
    """`request_s` is what the front end takes, both ways, and `hosts` where it runs. With `samples_anew` the first token comes from the
    decode instance. `finish` happens when every request has ended."""

    def __init__(self, scene: Scene, workload: Workload, *, request_s: float, hosts: Iterable[Host], samples_anew: bool) -> None:
        self.scene, self.workload = scene, workload
        self.requests = len(workload)
        self.ended = 0
        self.finish = scene.env.event()
        columns = (workload.priority, workload.ttft_slo_s, workload.tpot_slo_s, workload.n, workload.best_of)
        self._sessions = workload.sessions()
        self._labelled = self._sessions is not None or workload.tenant is not None or workload.offline is not None
        self._plain = not self._labelled and all(column is None for column in columns)  # a request is its prompt, nothing else
        self._samples_anew = samples_anew
        self.request_s, self.hosts = request_s, hosts
        self._followers: dict[int, list[int]] = {}  # sessions: a turn -> the turns that wait for its end
        self._next_closed = 0
        self._arrivals: Iterator[tuple[int, float, int, int]] = iter(())
        self._arrival_callbacks: list[Callable[[Any], None]] = [self._arrival]

    def start(self) -> None:
        """The first come; each of the others when its time is there, or when the one it waits for has ended."""
        workload = self.workload
        if workload.after is not None:
            for i, earlier in enumerate(workload.after.tolist()):
                if earlier >= 0:
                    self._followers.setdefault(earlier, []).append(i)
        if workload.concurrency is not None:
            self._next_closed = min(workload.concurrency, self.requests)
            for i in range(self._next_closed):
                self._arrive_by_index(i)
        else:
            self._arrivals = self._open_arrivals()
            first = next(self._arrivals, None)
            if first is not None:
                After(self.scene.env, max(0.0, first[1] - self.scene.env.now), self._arrival_callbacks, first)

    def end(self, i: int) -> None:
        """That request has ended."""
        self.ended += 1
        if self._followers and (turns := self._followers.pop(i, None)):
            for turn in turns:
                After(self.scene.env, float(self.workload.arrival_s[turn]), [self._turn], turn)
        if self._next_closed and self._next_closed < self.requests:
            After(self.scene.env, 0.0, [self._turn], self._next_closed)
            self._next_closed += 1
        if self.ended == self.requests:
            self.finish.succeed()

    def _turn(self, event: After) -> None:
        self._arrive_by_index(event._value)

    def _open_arrivals(self) -> Iterator[tuple[int, float, int, int]]:
        w, step = self.workload, 8192
        for start in range(0, len(w), step):
            part = slice(start, start + step)
            rows = zip(w.arrival_s[part].tolist(), w.prompt_tokens[part].tolist(), w.output_tokens[part].tolist(), strict=True)
            for i, (arrival_s, prompt, output) in enumerate(rows, start):
                if w.after is None or w.after[i] < 0:
                    yield i, arrival_s, prompt, output

    def _arrival(self, event: After) -> None:
        i, _, prompt, output = event._value
        self._arrive(i, prompt, output)
        following = next(self._arrivals, None)
        if following is not None:
            env = self.scene.env
            in_s = following[1] - env._now
            After(env, in_s if in_s > 0.0 else 0.0, self._arrival_callbacks, following)

    def _arrive_by_index(self, i: int) -> None:
        self._arrive(i, int(self.workload.prompt_tokens[i]), int(self.workload.output_tokens[i]))

    def _arrive(self, i: int, prompt: int, output: int) -> None:
        w, scene = self.workload, self.scene
        now = scene.env._now
        hashes: tuple[int, ...] = ()
        context: tuple[int, ...] = ()
        if w.hashes is not None:
            context = w.hashes[i]
            hashes = context[: prompt // w.hash_tokens]
        if self._plain:
            request = Request(i, now, prompt, hashes)
        else:
            request = self._rich_request(i, now, prompt, hashes)
            if request.best_of > 1 and not context:  # candidates share the prompt through the prefix cache, so it needs names
                units = prompt // w.hash_tokens
                context = tuple(-1 - (i << 20) - u for u in range(units))
        job = scene.jobs[i] = Job(i, request, output, context)
        if self._samples_anew or request.best_of > 1:
            job.samples_anew = True
        if self.request_s:
            After(scene.env, self.request_s, [self._received], Arrived(request, output))
        else:
            scene.teller.tell(Arrived(request, output), now)

    def _received(self, event: After) -> None:
        for host in self.hosts:
            host.received()
        self.scene.teller.tell(event._value, self.scene.env._now)

    def _rich_request(self, i: int, now: float, prompt: int, hashes: tuple[int, ...]) -> Request:
        w = self.workload
        ttft_s = None if w.ttft_slo_s is None or math.isnan(w.ttft_slo_s[i]) else float(w.ttft_slo_s[i])
        tpot_s = None if w.tpot_slo_s is None or math.isnan(w.tpot_slo_s[i]) else float(w.tpot_slo_s[i])
        n = 1 if w.n is None else int(w.n[i])
        best_of = max(n, 1 if w.best_of is None else int(w.best_of[i]))
        labels = w.labels(i, self._sessions) if self._labelled else {}
        return Request(i, now, prompt, hashes, 0 if w.priority is None else int(w.priority[i]), ttft_s, tpot_s, n, best_of, **labels)
