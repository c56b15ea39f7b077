"""One instance's own side, sans-IO: its life around its scheduler, whoever runs it.

    worker.submit(seq)                      its prompt is computed here
    worker.reserve(seq), worker.arrive(seq) it is computed elsewhere, and decodes here
    batch = worker.next_batch(now); prefilled, finished = worker.complete(batch, steps, now, ended)

A world gives time (the simulator), or tensors and bytes (the engine), and hangs its own object on `Sequence.owner`. Commands are methods,
since the simulator gives a million of them; what a step brings comes back from `complete`, a refusal from the command that is refused.

KV is *held* here, under a lease, for whoever reads it: a prompt whose request decodes elsewhere, from `complete` on, or a request that
stands still for the last stage of its migration. A lease ends when it is read (`release`), or by time. What is reserved may have a
deadline, too. `wake_s` is the next of them; `overdue` names who has missed one, and `lapse` acts on it, once the world's readers and
writers are off its blocks.

The candidates of a request (best_of) are sequences of their own. The first computes the prompt; the others are submitted when it is
computed, and find it in the prefix cache.

What must not touch a step under way waits for its end: `abort`, and whatever is given to `between_steps`. A step has ended when its news
are dealt with, and the world says `settle`.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf

from pdlab.core.batch import Batch
from pdlab.core.report import Meter, report_of
from pdlab.core.scheduler import NOTHING, Commands, Scheduler
from pdlab.core.sequence import Sequence
from pdlab.core.types import Report, Role

LEASE_S = 30.0


class Worker:
    """`commands` is what stands before the scheduler, such as a log of it. `context_tokens` bounds prompt and output of one sequence,
    besides what its KV memory holds. The world tells the `meter` how long each step took."""

    def __init__(
        self,
        scheduler: Scheduler,
        commands: Commands | None = None,
        *,
        name: str = "",
        incarnation: int = 0,
        role: Role = Role.MIXED,
        context_tokens: int = 0,
        lease_s: float = LEASE_S,
    ) -> None:
        self.scheduler = scheduler
        self.commands: Commands = scheduler if commands is None else commands
        self.name, self.incarnation, self.role = name, incarnation, role
        self.lease_s = lease_s
        self.most_tokens = min(scheduler.most_tokens, context_tokens or scheduler.most_tokens)
        self.draining = False
        self.goal: Role | None = None  # of a drain: the role to take then; None: to leave
        self.batch: Batch | None = None  # the step under way
        self.waits: list[Callable[[], None]] = []  # for its end
        self.due: dict[Sequence, float] = {}  # what is held, and what is expected by a deadline
        self.families = 0  # requests of several candidates
        self.meter = Meter()

    # ------------------------------------------------------------ computed here

    def refusal(self, prompt_tokens: int, output_tokens: int) -> str:
        """Why no request of that size can ever be served here, or ""."""
        if prompt_tokens + output_tokens <= self.most_tokens:
            return ""
        return f"prompt of {prompt_tokens} and output of {output_tokens} tokens exceed the {self.most_tokens} tokens that fit here"

    def submit(self, seq: Sequence, others: list[Sequence] = NOTHING) -> None:
        """Queue a request; `others` are its further candidates."""
        if others:
            self._tie(seq, others)
        self.commands.submit(seq)

    def stay(self, seq: Sequence, others: list[Sequence] = NOTHING, output_tokens: int = 0) -> None:
        """What is held decodes here after all; it makes `output_tokens` in all, where that has changed. Of several candidates each samples
        its own first token here, from the prompt's KV: the one that is made is dropped."""
        if output_tokens:
            self.commands.lengthen(seq, output_tokens)
        del self.due[seq]
        if others:
            self._tie(seq, others)
        self.commands.stay(seq, missing=1 if others else 0)

    # ------------------------------------------------------------ computed elsewhere

    def reserve(self, seq: Sequence, others: list[Sequence] = NOTHING, due_s: float = inf) -> bool:
        """Take blocks for KV that comes until `due_s`; False, and nothing taken, where there is no room now."""
        if not self.commands.reserve(seq):
            return False
        if others:
            self._tie(seq, others)
        if due_s < inf:
            self.due[seq] = due_s
        return True

    def extend(self, seq: Sequence, tokens: int) -> bool:
        """More was made of it elsewhere: it shall hold `tokens` in all. False, and nothing taken, where there is no room now."""
        return tokens <= seq.prompt_tokens or self.commands.extend(seq, tokens)

    def compute(self, seq: Sequence) -> None:
        """What was reserved does not come: its prompt is computed here, all of it that the prefix cache does not hold."""
        self.due.pop(seq, None)
        self.commands.remove(seq)
        seq.cached_tokens = 0
        self.commands.submit(seq)

    def arrive(self, seq: Sequence, missing: int = 0) -> None:
        """Its KV is here, but for the last `missing` tokens, which are computed here."""
        if self.due:
            self.due.pop(seq, None)
        self.commands.arrive(seq, missing)
        if self.families and not missing:
            self._fork(seq)

    # ------------------------------------------------------------ read elsewhere

    def lend(self, seq: Sequence, until_s: float = inf) -> bool:
        """Hold what the prefix cache has of a sequence that is nobody's, for who reads it; False where it has none."""
        if not self.commands.lend(seq):
            return False
        self.due[seq] = until_s
        return True

    def export(self, seq: Sequence) -> str:
        """What it holds now may be copied, while it goes on; "", or why not."""
        if seq.others or seq.parent is not None:
            return "it has several candidates"
        if not self.scheduler.movable(seq):
            return "it does not run here"
        if seq.exported not in (-1, seq.preempted):
            return "it was preempted"
        seq.exported = seq.preempted
        return ""

    def resume(self, seq: Sequence) -> None:
        """Its migration is called off: it goes on here."""
        seq.exported = -1
        if seq in self.scheduler.held:
            self.stay(seq)

    def stop(self, seq: Sequence, now: float, lease_s: float = 0.0) -> str:
        """Between steps: it stands still, and is held for the last copy; "", or why not."""
        reason = self.export(seq)
        if not reason:
            self.commands.hold(seq)
            self.due[seq] = now + (lease_s or self.lease_s)
        return reason

    def renew(self, seq: Sequence, until_s: float) -> bool:
        """Its deadline is not before then. False: it has none (any more)."""
        due_s = self.due.get(seq)
        if due_s is None:
            return False
        self.due[seq] = max(until_s, due_s)
        return True

    def grown(self, seq: Sequence, hashes: tuple[int, ...]) -> None:
        """The names of all its full blocks, for the prefix cache to keep what it has made."""
        self.commands.rename(seq, hashes)

    def release(self, seq: Sequence) -> None:
        """What is held was read, or is not wanted. Harmless where it is not held."""
        if seq in self.scheduler.held:
            del self.due[seq]
            self.commands.release(seq)

    # ------------------------------------------------------------ ends

    def abort(self, seq: Sequence) -> None:
        """Drop a request, all its candidates included, between steps. Harmless where it has ended."""
        root = seq.parent or seq
        if self.batch is None:
            self._remove(root)
        else:
            self.between_steps(lambda: self._remove(root))

    def withdraw(self, seq: Sequence) -> None:
        """Between steps: drop one candidate of a request, while the others go on. Without the first, the next computes the prompt."""
        self._drop(seq)
        others = seq.others
        if not others or others[0].order:
            self._left(seq)
            return
        seq.others = None
        self.families -= 1
        others[0].parent = None
        self.submit(others[0], others[1:])

    def drain(self, goal: Role | None) -> None:
        """Let what is here end; then take that role, or leave. `drained` says when."""
        self.draining, self.goal = True, goal

    @property
    def idle(self) -> bool:
        """Nothing is here, running, waiting, leased or expected."""
        return self.batch is None and self.scheduler.idle

    def drained(self) -> bool:
        """It was to drain, and is idle. True once."""
        if not self.draining or not self.idle:
            return False
        self.draining = False
        return True

    def switch(self, role: Role) -> None:
        """It has drained, and has another role from now on."""
        self.draining, self.goal, self.role = False, None, role

    def die(self) -> None:
        """At once. What it held is gone with it, and nobody asks it any more."""
        self.draining = False
        self.batch = None
        self.waits.clear()
        self.due.clear()

    # ------------------------------------------------------------ time

    def wake_s(self) -> float | None:
        """The next deadline."""
        due_s = min(self.due.values(), default=inf)
        return due_s if due_s < inf else None

    def overdue(self, now: float) -> list[Sequence]:
        """Whose deadline has come. They stay so until `renew`ed, or `lapse`d."""
        return [seq for seq, due_s in self.due.items() if due_s <= now]

    def lapse(self, seq: Sequence) -> None:
        """Its deadline has come: a prompt that nobody has read is dropped, and so is what was expected; what stood still goes on here."""
        if seq not in self.scheduler.held:
            del self.due[seq]
            self.abort(seq)
        elif seq.decodes_here:
            self.resume(seq)
        else:
            self.release(seq)

    # ------------------------------------------------------------ the step

    def between_steps(self, call: Callable[[], None]) -> None:
        """When the step under way has ended; at once where there is none. A macro-step had better end early then: `stirred` is set."""
        if self.batch is None:
            call()
        else:
            self.waits.append(call)
            self.scheduler.stirred = True

    def settle(self) -> None:
        """The last step has ended, and its news are dealt with: what waited for that is done now."""
        while self.waits:
            calls, self.waits = self.waits, []
            for call in calls:
                call()
        self.batch = None

    def next_batch(self, now: float) -> Batch | None:
        """What runs next; None: nothing can."""
        self.batch = batch = self.commands.next_batch(now)
        return batch

    def draft(self, seq: Sequence, tokens: int) -> int:
        """Up to `tokens` drafted ones are verified in the step under way, if there is room. Then `accept`, before it is complete."""
        return self.commands.draft(seq, tokens)

    def accept(self, seq: Sequence, tokens: int) -> None:
        """So many of the drafted ones were right."""
        self.commands.accept(seq, tokens)

    def advance(self, batch: Batch, steps: int) -> None:
        """`steps` of a decode batch are done, and the next one is under way."""
        self.commands.advance(batch, steps)

    def complete(self, batch: Batch, steps: int, now: float, ended: list[Sequence] = NOTHING) -> tuple[list[Sequence], list[Sequence]]:
        """The batch ran `steps` more times; in the last, these `ended` before their length. Returns (prefilled, finished) as the Scheduler
        does, requests in place of their candidates: one has finished with the last of them. What is prefilled and does not stay is held
        from now on."""
        done = self.commands.complete(batch, steps, now)
        if ended or self.families:
            done = self._requests(*done, ended)
        for seq in done[0]:
            if not seq.decodes_here:
                self.due[seq] = now + self.lease_s
        return done

    # ------------------------------------------------------------ what it says of itself

    def report(self, now: float) -> Report:
        """Its load. What changed in its prefix cache, and steps, are told once."""
        report = report_of(self.scheduler, self.meter, self.name, self.incarnation, now)
        if self.scheduler.foresight is not None and report.steps:
            self.commands.learn(report.steps)
        return report

    def check(self) -> None:
        """Invariant 1, and that every deadline is that of something held or expected."""
        s = self.scheduler
        s.check()
        assert all(seq in s.held or seq in s.reserved for seq in self.due), "a deadline of what is not here"
        assert all(seq in self.due for seq in s.held), "held without a deadline"

    # ------------------------------------------------------------ inside

    def _tie(self, seq: Sequence, others: list[Sequence]) -> None:
        seq.others = list(others)
        for other in others:
            other.parent = seq
        self.families += 1

    def _fork(self, seq: Sequence) -> None:
        """If its prompt is computed, and it goes on here: those who wait for it follow."""
        others = seq.others
        if others and seq.decodes_here and not others[0].order:
            for other in others:
                self.commands.submit(other)

    def _requests(
        self, prefilled: list[Sequence], finished: list[Sequence], ended: list[Sequence]
    ) -> tuple[list[Sequence], list[Sequence]]:
        """Of a step's (prefilled, finished) sequences, and those that `ended` before their length: the requests in place of them. One has
        finished when no candidate is left."""
        stopped = [seq for seq in ended if seq.holding is not None]
        for seq in stopped:
            self.commands.remove(seq)
        finished = [*finished, *stopped]
        for seq in (*prefilled, *finished):
            self._fork(seq)
        finished = [seq.parent or seq for seq in finished if self._left(seq)]
        return [seq for seq in prefilled if seq.parent is None and seq.holding is not None], finished

    def _left(self, seq: Sequence) -> bool:
        """A candidate has ended. Was it the last of its request?"""
        root = seq.parent or seq
        others = root.others
        if others is None:
            return True
        if seq is root:
            seq.over = True
        else:
            others.remove(seq)
        if others or not root.over:
            return False
        root.others = None
        self.families -= 1
        return True

    def _remove(self, seq: Sequence) -> None:
        others = seq.others
        if others is not None:
            seq.others = None
            self.families -= 1
            for other in others:
                self._drop(other)
        self._drop(seq)

    def _drop(self, seq: Sequence) -> None:
        if seq.order:
            self.due.pop(seq, None)
            self.commands.remove(seq)
