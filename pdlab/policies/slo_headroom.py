"""Where an objective is met with room to spare, by latencies learned from what has happened. Source: llm-d's predicted-latency scorer.

Two small models, ridge regressions that forget, predict TTFT and TPOT of a request on an instance: of what the instance's own predictors
say of its queue and of this request, and of the requests there. TTFT is learned from each computed prompt, TPOT from each whole answer.
Until `warm_up` of them were seen the predictors' figures stand for the model's.

Headroom is `buffer` x objective, less what has passed, less the prediction. Of the instances with some, the one with the most takes the
request; with `pack`, the original's default, the one with the least, so that others keep room for what is harder. Where none has any, an
idle one, else the one that misses least. In the part `explore` of all cases anyone, so that the models see what they would not choose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from pdlab.core.policy import Policy, Range
from pdlab.core.types import Event, Finished, Left, PrefillDone, Request, Tick, Transferred
from pdlab.core.view import Cluster, Instance

Features = tuple[float, ...]
EVERY = 8  # samples from one solution to the next


class Ridge:
    """Least squares of relative errors, drawn to the first guess: the sum of the features that are seconds already."""

    def __init__(self, guess: Features, *, forget: float, strength: float = 1.0) -> None:
        self.weights: NDArray[np.floating[Any]] = np.array(guess)
        self.samples = 0
        self._forget = forget
        self._gram = strength * np.eye(len(guess))
        self._moment = strength * self.weights

    def learn(self, features: Features, seconds: float) -> None:
        row = np.array(features) / max(seconds, 1e-3)
        self._gram = self._forget * self._gram + np.outer(row, row)
        self._moment = self._forget * self._moment + row * (seconds / max(seconds, 1e-3))
        self.samples += 1
        if self.samples % EVERY == 0:
            self.weights = np.linalg.solve(self._gram + 1e-6 * np.eye(len(row)), self._moment)

    def seconds(self, features: Features) -> float:
        return max(0.0, float(self.weights @ np.array(features)))


@dataclass
class SloHeadroom(Policy):
    pack: bool = False
    buffer: Annotated[float, Range(gt=0.0, tuned=(0.5, 1.2))] = 0.9
    explore: Annotated[float, Range(ge=0.0, le=1.0)] = 0.01
    warm_up: Annotated[int, Range(ge=1)] = 50
    forget: Annotated[float, Range(gt=0.0, le=1.0)] = 0.999

    rests = True

    def __post_init__(self) -> None:
        self.ttft = Ridge((0.0, 1.0, 1.0, 0.0, 0.0), forget=self.forget)
        self.tpot = Ridge((0.0, 1.0, 0.0), forget=self.forget)
        self._prompts: dict[int, tuple[float, Features]] = {}  # by request: when it was placed, and what was known
        self._answers: dict[int, tuple[float, Features]] = {}  # likewise; from its first decode on, that is when it began

    def dispatch(self, request: Request, cluster: Cluster) -> Instance | None:
        if not cluster.prefill:
            return None
        hits, objective_s = cluster.cached_tokens(request), cluster.ttft_slo_s if request.ttft_slo_s is None else request.ttft_slo_s
        known = [
            (1.0, x.ttft_s(x.prefill_tokens), x.ttft_s(request.prompt_tokens - hits.get(x, 0)), x.prefill_requests, x.decode_requests)
            for x in cluster.prefill
        ]
        left_s = self.buffer * objective_s - (cluster.now - request.arrival_s)
        chosen = self._choose(cluster, cluster.prefill, [left_s - self._predict(self.ttft, one, sum(one[1:3])) for one in known])
        self._prompts[request.id] = cluster.now, known[chosen]
        return cluster.prefill[chosen]

    def handoff(self, request: Request, cluster: Cluster) -> Instance | None:
        if not cluster.decode:
            return None
        objective_s = cluster.tpot_slo_s if request.tpot_slo_s is None else request.tpot_slo_s
        prompt = request.prompt_tokens
        known = [
            (1.0, x.tpot_s(x.decode_requests + 1, x.report.context_tokens + x.since_decode_tokens + prompt), 1e-3 * x.decode_requests)
            for x in cluster.decode
        ]
        chosen = self._choose(cluster, cluster.decode, [self.buffer * objective_s - self._predict(self.tpot, one, one[1]) for one in known])
        self._answers[request.id] = cluster.now, known[chosen]
        return cluster.decode[chosen]

    def _predict(self, model: Ridge, known: Features, guess_s: float) -> float:
        return model.seconds(known) if model.samples >= self.warm_up else guess_s

    def _choose(self, cluster: Cluster, candidates: Sequence[Instance], headroom_s: Sequence[float]) -> int:
        """Its place among the candidates."""
        if cluster.rng.random() < self.explore:
            return cluster.rng.randrange(len(candidates))
        places = range(len(candidates))
        enough = [i for i in places if headroom_s[i] > 0.0]
        if enough:
            return min(enough, key=lambda i: headroom_s[i]) if self.pack else max(enough, key=lambda i: headroom_s[i])
        idle = [i for i in places if not candidates[i].prefill_requests and not candidates[i].decode_requests]
        return max(idle or places, key=lambda i: headroom_s[i])

    def observe(self, event: Event, cluster: Cluster) -> None:
        now = cluster.now
        if isinstance(event, PrefillDone) and event.request_id in self._prompts:
            placed_s, known = self._prompts.pop(event.request_id)
            self.ttft.learn(known, now - placed_s)
        elif isinstance(event, Transferred) and event.request_id in self._answers:
            self._answers[event.request_id] = now, self._answers[event.request_id][1]
        elif isinstance(event, Finished):
            self._prompts.pop(event.request_id, None)
            began_s, known = self._answers.pop(event.request_id, (now, ()))
            if known and event.output_tokens > 1:
                self.tpot.learn(known, (now - began_s) / (event.output_tokens - 1))
        elif isinstance(event, Tick | Left):
            for kept in (self._prompts, self._answers):
                for request_id in [one for one in kept if one not in cluster.live]:
                    del kept[request_id]
