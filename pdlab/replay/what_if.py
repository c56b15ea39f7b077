"""What another policy would have decided, asked beside the one that decides: same view, same moments, and no effect.

The other policy keeps its own memory, as if its answers had been followed; what it is shown is the run as it was. So its answers say where
two policies part on one run, not how a run of the other's would have gone.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pdlab import __version__
from pdlab.core.blame import blamed
from pdlab.core.policy import Borrow, Policy, Reject
from pdlab.core.types import Event, Request, Role, Scale, UsageError
from pdlab.core.view import Cluster, Instance
from pdlab.experiment.experiment import read_back
from pdlab.experiment.make_router import router
from pdlab.policies import load as load_policy
from pdlab.replay.log import Difference, entries_in, head_in, read, replay

T = TypeVar("T")
LATELY = 200  # answers of a hook


@dataclass(frozen=True, slots=True)
class Departure:
    """`request_id` is None for migrate and resize, which are about the cluster."""

    now: float
    hook: str
    request_id: int | None
    decided: str
    other: str


class Shadow(Policy):
    """Decides as `policy`; `departures` are the answers of `other` that differ, the last `most_kept` of them. `asked` is how often each
    hook was asked, `departed` how often it was answered otherwise, `lately` whether the last answers were, the latest last."""

    def __init__(self, policy: Policy, other: Policy, *, seed: int, most_kept: int | None = None) -> None:
        self.policy, self.other = policy, other
        self.tick_s, self.pairs, self.queues = policy.tick_s, policy.pairs, policy.queues
        self.rng = random.Random(seed)
        self.asked: Counter[str] = Counter()
        self.departed: Counter[str] = Counter()
        self.lately: dict[str, deque[bool]] = {}
        self.departures: deque[Departure] = deque(maxlen=most_kept)

    def dispatch(self, request: Request, cluster: Cluster) -> Instance | Borrow | Reject | None:
        return self._both("dispatch", request.id, cluster, lambda policy: policy.dispatch(request, cluster), _place)

    def handoff(self, request: Request, cluster: Cluster) -> Instance | None:
        return self._both("handoff", request.id, cluster, lambda policy: policy.handoff(request, cluster), _place)

    def migrate(self, cluster: Cluster) -> Sequence[tuple[int, Instance]]:
        return self._both("migrate", None, cluster, lambda policy: list(policy.migrate(cluster)), _moves)

    def resize(self, cluster: Cluster) -> Sequence[tuple[Instance, Role] | Scale]:
        return self._both("resize", None, cluster, lambda policy: list(policy.resize(cluster)), _sizes)

    def first(self, waiting: Sequence[Request], cluster: Cluster) -> Request:
        return self._both("first", None, cluster, lambda policy: policy.first(waiting, cluster), lambda answer: str(answer.id))

    def evict(self, cluster: Cluster) -> Sequence[int]:
        return self._both("evict", None, cluster, lambda policy: list(policy.evict(cluster)), _ids)

    def observe(self, event: Event, cluster: Cluster) -> None:
        self.policy.observe(event, cluster)
        self._aside(cluster, lambda: self.other.observe(event, cluster))

    def _both(self, hook: str, request_id: int | None, cluster: Cluster, ask: Callable[[Policy], T], tell: Callable[[T], str]) -> T:
        decided = ask(self.policy)
        self.asked[hook] += 1
        other = self._aside(cluster, lambda: ask(self.other))
        differs = tell(decided) != self._words(hook, other, tell)
        self.lately.setdefault(hook, deque(maxlen=LATELY)).append(differs)
        if differs:
            self.departed[hook] += 1
            self.departures.append(Departure(cluster.now, hook, request_id, tell(decided), tell(other)))
        return decided

    def _words(self, hook: str, other: T, tell: Callable[[T], str]) -> str:
        try:
            return tell(other)
        except (AttributeError, TypeError, ValueError, IndexError):
            who, what = blamed(self.other, hook, f"answered {' '.join(repr(other).split())[:80]}")
            raise TypeError(f"{who} {what}") from None

    def _aside(self, cluster: Cluster, ask: Callable[[], T]) -> T:
        """With a generator of its own, so that the run's draws stay as they were."""
        own, cluster.rng = cluster.rng, self.rng
        try:
            return ask()
        finally:
            cluster.rng = own


def beside(log: Path, other: object) -> tuple[Shadow, int, Difference | None]:
    """Replay a log with `other` asked beside its own policy: the shadow, the events, and where the replay itself departs from the log, and
    ends.
    `other` is as an experiment's `policy:` has it, a file's path being from here. Raises UsageError."""
    asked = load_policy.build(other, Path())
    head, entries = read(log)
    experiment = read_back(head.experiment, str(log))
    shadow = Shadow(load_policy.build(experiment.policy, experiment.base_dir), asked, seed=experiment.seed)
    with closing(entries):
        return shadow, *replay(entries, router(experiment, hash_tokens=head.hash_tokens, policy=shadow))


class ShadowRouter:
    """The same while the log is still written: fed its lines as they come, the head first. `other` is built already; `most_kept` departures
    are kept. Raises UsageError where the head is none, or the policy that decides is not that of the log."""

    def __init__(self, head_line: bytes, other: Policy, *, most_kept: int) -> None:
        self.head = head_in(head_line)
        deployment = read_back(self.head.experiment, "the router's event log")
        policy = load_policy.build(deployment.policy, deployment.base_dir)
        if load_policy.source_hash(policy) != self.head.policy_hash:
            raise UsageError(
                f"the router decides by another version of its policy: pdlab {self.head.pdlab} there, {__version__} here; "
                "give both the same files"
            )
        self.shadow = Shadow(policy, other, seed=deployment.seed, most_kept=most_kept)
        self.router = router(deployment, hash_tokens=self.head.hash_tokens, policy=self.shadow)
        self.events = 0

    def feed(self, lines: bytes) -> None:
        """Whole lines. Raises UsageError where they are none, where the other policy makes a mistake, and where this router answers
        otherwise than the log says: it knows other things from then on."""
        events, difference = replay(entries_in(lines), self.router)
        self.events += events
        if difference is not None:
            raise UsageError(
                f"at {difference.now:.3f} s the router answered otherwise than its log's replay does: pdlab {self.head.pdlab} there, "
                f"{__version__} here (pdlab replay says more)"
            )


def _place(answer: Instance | Borrow | Reject | None) -> str:
    if isinstance(answer, Borrow):
        return f"{answer.instance.name} with the prefix of {answer.holder.name}"
    if isinstance(answer, Reject):
        return f"reject ({answer.reason})"
    return "wait" if answer is None else answer.name


def _moves(answer: Sequence[tuple[int, Instance]]) -> str:
    return ", ".join(f"{id} to {target.name}" for id, target in answer) or "nothing"


def _ids(answer: Sequence[int]) -> str:
    return ", ".join(map(str, answer)) or "nobody"


def _sizes(answer: Sequence[tuple[Instance, Role] | Scale]) -> str:
    said = [f"{a.count:+d} {a.role}" if isinstance(a, Scale) else f"{a[0].name} to {a[1]}" for a in answer]
    return ", ".join(said) or "nothing"
