"""xLLM's SLO_AWARE: both instances chosen by predicted TTFT and TPOT, and roles flipped both ways. Source: xLLM.

For a prompt of L tokens, with each instance's predictors fitted to its own profile:
 1. Decode on the first instance, in order, whose TPOT with this request meets the objective; else on the one with the least TPOT, D_min.
 2. Prefill on the instance with the least prefill time left, t_min (the mean is t_avg); while nothing is predicted, on the least loaded.
 3. If t_min misses the objective and D_min is not the choice of 1, has TPOT to spare and would start sooner, prefill (and decode) there.
 4. If no decode instance meets its objective, and prefill has time to spare or the fewer instances are on decode: flip the instance
    of 2 to decode.
 5. A decode instance that has served and has nothing left flips to prefill. One instance of each role always remains, and mixed ones are
    given a role at the start: the first decodes, the others prefill.

Flips happen in `resize`. Beyond the original: prefill time left shrinks while the head of the queue is computed; an instance keeps
its role for `min_flip_interval_s`; and a switch, which costs about `switch_cost_s`, has to be worth it.

That means: 4 needs the objective to have been out of reach for that long; 5 looks at the last empty one alone, since the first are filled
first, and takes it while the objective is met, and though it has never served where prompts wait longer than that. `as_found=True` leaves
all of this out and, as in the original's later versions, never carries out 4. The books lose a request's share once, whatever ends its
prefill.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pdlab.core.policy import Policy, Range, Reject
from pdlab.core.types import Cancelled, Event, Failed, Finished, Left, PrefillDone, Refused, Request, Role, Scale, Tick, TransferFailed
from pdlab.core.view import Cluster, Instance


class PrefillBook:
    """Predicted seconds of each outstanding prompt of one instance, first come first served."""

    __slots__ = ("head_since_s", "shares_s", "total_s")

    def __init__(self) -> None:
        self.shares_s: dict[int, float] = {}
        self.total_s = 0.0
        self.head_since_s = 0.0

    def add(self, request_id: int, seconds: float, now: float) -> None:
        if not self.shares_s:
            self.head_since_s = now
        self.shares_s[request_id] = seconds
        self.total_s += seconds

    def remove(self, request_id: int, now: float) -> None:
        if next(iter(self.shares_s)) == request_id:
            self.head_since_s = now
        self.total_s -= self.shares_s.pop(request_id)
        if not self.shares_s:
            self.total_s = 0.0  # no rounding error outlives a queue

    def left_s(self, now: float) -> float:
        """Seconds until all is computed; what has passed counts for the head alone."""
        return self.total_s - min(next(iter(self.shares_s.values())), now - self.head_since_s) if self.shares_s else 0.0


@dataclass
class XllmSloAware(Policy):
    tick_s: Annotated[float, Range(gt=0.0, tuned=(0.05, 5.0), log=True)] | None = 0.5
    pairs: bool = True
    rests = True
    min_flip_interval_s: Annotated[float, Range(ge=0.0, tuned=(0.5, 60.0), log=True)] = 10.0
    switch_cost_s: Annotated[float, Range(ge=0.0, tuned=(0.05, 20.0), log=True)] = 1.0
    as_found: bool = False

    def __post_init__(self) -> None:
        self._books: dict[Instance, PrefillBook] = {}
        self._where: dict[int, Instance] = {}  # in whose book a request is
        self._pair: tuple[int, Instance] | None = None  # the decode instance chosen along with the last prefill instance
        self._served: set[Instance] = set()  # decode instances that were ever chosen
        self._short_since_s: float | None = None  # since when no decode instance meets the objective
        self._to_decode: Instance | None = None  # the flip that step 4 asks for

    # ------------------------------------------------------------ placing

    def dispatch(self, request: Request, cluster: Cluster) -> Instance | Reject | None:
        self._forget(request.id, cluster.now)
        if not cluster.prefill or not cluster.decode:
            return None
        decode, fastest, meets = self._choose_decode(request, cluster)
        self._note_shortage(meets, cluster.now)
        target_s = cluster.ttft_slo_s if request.ttft_slo_s is None else request.ttft_slo_s
        waits_s = [self.left_s(x, cluster.now) for x in cluster.prefill]
        wait_s = min(waits_s)
        prefill = cluster.prefill[waits_s.index(wait_s)]
        if not prefill.prefill_predictor.known:
            prefill = min(cluster.prefill, key=lambda x: (x.prefill_tokens, x.index))
        n_prefill, n_decode = len(cluster.prefill), len(cluster.decode)
        if not meets and (sum(waits_s) / n_prefill < target_s * (n_prefill - 1) / n_prefill or n_decode < n_prefill):
            self._to_decode = prefill
        if (
            wait_s > target_s
            and fastest is not decode
            and self._tpot_s(fastest, request) < self._tpot_target_s(request, cluster) * (n_decode - 1) / n_decode
            and self.left_s(fastest, cluster.now) < wait_s
        ):
            prefill = decode = fastest
        self._books.setdefault(prefill, PrefillBook()).add(request.id, prefill.ttft_s(request.prompt_tokens), cluster.now)
        self._where[request.id] = prefill
        self._pair = (request.id, decode)
        self._served.add(decode)
        return prefill

    def handoff(self, request: Request, cluster: Cluster) -> Instance | None:
        pair, self._pair = self._pair, None
        if pair is not None and pair[0] == request.id and pair[1] in cluster.decode:
            return pair[1]
        if not cluster.decode:
            return None
        decode = self._choose_decode(request, cluster)[0]
        self._served.add(decode)
        return decode

    def left_s(self, x: Instance, now: float) -> float:
        """Predicted seconds until the prompts sent to `x` are computed."""
        book = self._books.get(x)
        if book is None:
            return 0.0
        return book.total_s if self.as_found else book.left_s(now)

    def _choose_decode(self, request: Request, cluster: Cluster) -> tuple[Instance, Instance, bool]:
        """(choice, the one with the least TPOT, does the choice meet the objective?). Without a profile, the least loaded does."""
        target_s = self._tpot_target_s(request, cluster)
        tpot_s = {x: self._tpot_s(x, request) for x in cluster.decode}
        fastest = min(tpot_s, key=lambda x: (tpot_s[x], x.decode_tokens, x.index))
        if tpot_s[fastest] == 0.0:
            return fastest, fastest, True
        first = next((x for x, seconds in tpot_s.items() if seconds <= target_s), None)
        return (fastest, fastest, False) if first is None else (first, fastest, True)

    def _tpot_s(self, x: Instance, request: Request) -> float:
        """With this request there too. Context: the larger of the ledger's prompts, and what the report says and was sent since."""
        context = max(x.decode_tokens, x.report.context_tokens + x.since_decode_tokens)
        return x.tpot_s(x.decode_requests + 1, context + request.prompt_tokens)

    def _tpot_target_s(self, request: Request, cluster: Cluster) -> float:
        return cluster.tpot_slo_s if request.tpot_slo_s is None else request.tpot_slo_s

    # ------------------------------------------------------------ books

    def observe(self, event: Event, cluster: Cluster) -> None:
        if isinstance(event, Tick | Left):
            concerned = list(self._where)  # a loss or an expiry may end any of them
        elif isinstance(event, PrefillDone | Cancelled | Failed | Finished | Refused | TransferFailed):
            concerned = [event.request_id]
        else:
            return
        for request_id in concerned:
            live = cluster.live.get(request_id)
            if live is None or live.prefill_tokens < 0 or live.prefill is not self._where.get(request_id):
                self._forget(request_id, cluster.now)

    def _forget(self, request_id: int, now: float) -> None:
        x = self._where.pop(request_id, None)
        if x is not None:
            self._books[x].remove(request_id, now)

    # ------------------------------------------------------------ roles

    def resize(self, cluster: Cluster) -> Sequence[tuple[Instance, Role] | Scale]:
        ready = [x for x in cluster.instances if x.ready]
        self._served &= set(ready)
        self._books = {x: book for x, book in self._books.items() if book.shares_s}
        mixed = [x for x in ready if x.role is Role.MIXED]
        prefill = [x for x in ready if x.role is Role.PREFILL]
        decode = [x for x in ready if x.role is Role.DECODE]
        self.rests = bool(prefill or mixed) and not self._flips_in_time(decode, cluster.now)  # else a flip may be a matter of time
        if mixed:
            if len(ready) < 2:
                return ()
            first = mixed[0] if not decode else None
            return [(x, Role.DECODE if x is first else Role.PREFILL) for x in mixed]
        wanted, self._to_decode = self._to_decode, None
        if wanted is not None and wanted in prefill and len(prefill) > 1 and not self.as_found and self._may_flip(wanted, cluster.now):
            since_s = self._short_since_s
            if since_s is not None and cluster.now - since_s >= self.switch_cost_s:
                self._short_since_s = None
                return [(wanted, Role.DECODE)]
        return self._flips_to_prefill(prefill, decode, cluster.now)

    def _flips_to_prefill(self, prefill: list[Instance], decode: list[Instance], now: float) -> list[tuple[Instance, Role]]:
        idle = [x for x in decode if not x.decode_requests]
        if self.as_found:
            idle = [x for x in idle if x in self._served][: len(decode) - 1]
            self._served.difference_update(idle)
            return [(x, Role.PREFILL) for x in idle]
        wait_s = sum(self.left_s(x, now) for x in prefill) / len(prefill) if prefill else float("inf")
        last = next((x for x in reversed(idle) if self._may_flip(x, now)), None)  # the first ones are filled first
        if last is None or len(decode) < 2 or self._short_since_s is not None or not self._predicts(last):
            return []
        if last not in self._served and wait_s <= self.switch_cost_s:
            return []
        self._served.discard(last)
        return [(last, Role.PREFILL)]

    def _flips_in_time(self, decode: list[Instance], now: float) -> bool:
        """Though nothing happens: where the last empty one has served, or some may not flip yet."""
        idle = [x for x in decode if not x.decode_requests]
        if len(decode) < 2 or not idle or self._short_since_s is not None or not self._predicts(idle[-1]):
            return False
        return idle[-1] in self._served or not all(self._may_flip(x, now) for x in idle)

    def _predicts(self, x: Instance) -> bool:
        """Else no shortage is seen, and 4 would never flip back what 5 has flipped."""
        return x.tpot_s(1, 1) > 0.0

    def _may_flip(self, x: Instance, now: float) -> bool:
        return now - x.flipped_s >= self.min_flip_interval_s

    def _note_shortage(self, meets: bool, now: float) -> None:
        if meets:
            self._short_since_s = None
        elif self._short_since_s is None:
            self._short_since_s = now
