"""Where requests come from: arrivals in the open, loops that keep so many under way, and the turns of sessions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from pdlab.core.types import Arrived, Request
from pdlab.sim.calls import call_at
from pdlab.sim.due_call import DueCall
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
        self._asked_s = scene.env.now  # by the client, of the last of these

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
                self._await(i, 0.0)
        else:
            self._arrivals = self._open_arrivals()
            self._await_next()

    def end(self, i: int) -> None:
        """That request has ended."""
        self.ended += 1
        if self._followers and (turns := self._followers.pop(i, None)):
            for turn in turns:
                self._await(turn, float(self.workload.arrival_s[turn]))
        if self._next_closed and self._next_closed < self.requests:
            self._await(self._next_closed, 0.0)
            self._next_closed += 1
        if self.ended == self.requests:
            self.finish.succeed()

    def _open_arrivals(self) -> Iterator[tuple[int, float, int, int]]:
        w, step = self.workload, 8192
        for start in range(0, len(w), step):
            part = slice(start, start + step)
            rows = zip(w.arrival_s[part].tolist(), w.prompt_tokens[part].tolist(), w.output_tokens[part].tolist(), strict=True)
            for i, (arrival_s, prompt, output) in enumerate(rows, start):
                if w.after is None or w.after[i] < 0:
                    yield i, arrival_s, prompt, output

    def _await_next(self) -> None:
        following = next(self._arrivals, None)
        if following is not None:
            i, arrival_s, prompt, output = following
            in_s = arrival_s - self._asked_s
            if in_s > 0.0:
                self._asked_s += in_s
            asked_s = self._asked_s
            call_at(self.scene.env, asked_s + self.request_s, self._next_received, (i, asked_s, prompt, output))

    def _await(self, i: int, delay_s: float) -> None:
        """Its client asks in so many seconds, and the router hears of it when the front end has had its time."""
        w, asked_s = self.workload, self.scene.env._now + delay_s
        call_at(self.scene.env, asked_s + self.request_s, self._received, (i, asked_s, int(w.prompt_tokens[i]), int(w.output_tokens[i])))

    def _next_received(self, event: DueCall) -> None:
        self._received(event)
        self._await_next()

    def _received(self, event: DueCall) -> None:
        i, asked_s, prompt, output = event.value
        w, scene = self.workload, self.scene
        hashes: tuple[int, ...] = ()
        context: tuple[int, ...] = ()
        if w.hashes is not None:
            context = w.hashes[i]
            hashes = context[: prompt // w.hash_tokens]
        if self._plain:
            request = Request(i, asked_s, prompt, hashes)
        else:
            request = self._rich_request(i, asked_s, prompt, hashes)
            if request.best_of > 1 and not context:  # candidates share the prompt through the prefix cache, so it needs names
                units = prompt // w.hash_tokens
                context = tuple(-1 - (i << 20) - u for u in range(units))
        job = scene.jobs[i] = Job(i, request, output, context)
        if self._samples_anew or request.best_of > 1:
            job.samples_anew = True
        for host in self.hosts:
            host.received()
        scene.teller.tell(Arrived(request, output), scene.env._now)

    def _rich_request(self, i: int, asked_s: float, prompt: int, hashes: tuple[int, ...]) -> Request:
        w = self.workload
        ttft_s = None if w.ttft_slo_s is None or math.isnan(w.ttft_slo_s[i]) else float(w.ttft_slo_s[i])
        tpot_s = None if w.tpot_slo_s is None or math.isnan(w.tpot_slo_s[i]) else float(w.tpot_slo_s[i])
        n = 1 if w.n is None else int(w.n[i])
        best_of = max(n, 1 if w.best_of is None else int(w.best_of[i]))
        labels = w.labels(i, self._sessions) if self._labelled else {}
        return Request(i, asked_s, prompt, hashes, 0 if w.priority is None else int(w.priority[i]), ttft_s, tpot_s, n, best_of, **labels)
