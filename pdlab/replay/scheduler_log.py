"""An engine's scheduler, recorded: what it was told and what it decided, one JSON line each, and a replay that must decide the same.

{"kv_blocks": 512, "block_tokens": 16, ...}                         the scheduler as it began
{"submit": [order, prompt, output, priority, decodes_here], "hashes": []}  and reserve, lend, extend, arrive, ...: told to it
{"batch": [[[order, tokens], ...], decodes, repeat], "now": 1.25}   decided by it
{"complete": passes}                                                told to it
{"draft": order, "tokens": 4, "taken": 4} and {"accept": order, "tokens": 2}    between these two, and {"advance": passes} before
{"profile": [prefill, decode]} and {"learn": [step, ...]}           told to a batching with foresight

A submit and a reserve say in "aims" when the sequence arrived and what its objectives are, where it has any, and that it is
"offline" where it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf
from typing import Any

import msgspec

from pdlab import batching
from pdlab.core.batch import Batch
from pdlab.core.kv import BlockPool
from pdlab.core.scheduler import Commands, Scheduler
from pdlab.core.sequence import Sequence
from pdlab.core.types import Lines, StepTime, UsageError


@dataclass(frozen=True, slots=True)
class Setup:
    """How an instance batches; what its Scheduler is built from."""

    kv_blocks: int
    block_tokens: int = 16
    max_batch_tokens: int = 8192
    max_seqs: int = 256
    batching: str = "chunked"
    prefix_cache: bool = True
    watermark: float = 0.01

    def scheduler(self) -> Scheduler:
        return Scheduler(
            BlockPool(self.kv_blocks, self.block_tokens, prefix_cache=self.prefix_cache),
            batching.load(self.batching),
            max_batch_tokens=self.max_batch_tokens,
            max_seqs=self.max_seqs,
            watermark=self.watermark,
        )


_read_setup = msgspec.json.Decoder(Setup).decode


PROFILES = tuple[tuple[tuple[int, float], ...], tuple[tuple[int, int, float], ...]]


class Recorded(Commands):
    """Stands before a fresh Scheduler, and writes down what passes. Steps that are told to `advance` are counted with those that
    `complete` is told of, unless something is drafted between them."""

    def __init__(self, setup: Setup, scheduler: Scheduler, log: Lines) -> None:
        self.scheduler, self.log = scheduler, log
        self.advanced = 0  # steps of the batch under way
        self._write(setup)

    def _write(self, line: object) -> None:
        self.log.write(msgspec.json.encode(line) + b"\n")

    def submit(self, seq: Sequence) -> None:
        self.scheduler.submit(seq)
        told = [seq.order, seq.prompt_tokens, seq.output_tokens, seq.priority, seq.decodes_here]
        self._write({"submit": told, **({"hashes": seq.hashes} if seq.hashes else {}), **_aims(seq)})

    def reserve(self, seq: Sequence) -> bool:
        taken = self.scheduler.reserve(seq)
        told = [seq.order if taken else 0, seq.prompt_tokens, seq.output_tokens, seq.priority, seq.made]
        self._write({"reserve": told, "hashes": seq.hashes, **_aims(seq)})
        return taken

    def lend(self, seq: Sequence) -> bool:
        asked = seq.prompt_tokens
        taken = self.scheduler.lend(seq)
        self._write({"lend": seq.order if taken else 0, "tokens": asked, "hashes": seq.hashes})
        return taken

    def extend(self, seq: Sequence, tokens: int) -> bool:
        taken = self.scheduler.extend(seq, tokens)
        self._write({"extend": seq.order, "tokens": tokens, "taken": taken})
        return taken

    def arrive(self, seq: Sequence, missing: int = 0) -> None:
        self._write({"arrive": seq.order, "missing": missing})
        self.scheduler.arrive(seq, missing)

    def hold(self, seq: Sequence) -> None:
        self._write({"hold": seq.order})
        self.scheduler.hold(seq)

    def stay(self, seq: Sequence, missing: int = 0) -> None:
        self._write({"stay": seq.order, "missing": missing})
        self.scheduler.stay(seq, missing)

    def release(self, seq: Sequence) -> None:
        self._write({"release": seq.order})
        self.scheduler.release(seq)

    def remove(self, seq: Sequence) -> None:
        self._write({"remove": seq.order})
        self.scheduler.remove(seq)

    def rename(self, seq: Sequence, hashes: tuple[int, ...]) -> None:
        self._write({"rename": seq.order, "hashes": hashes})
        self.scheduler.rename(seq, hashes)

    def lengthen(self, seq: Sequence, output_tokens: int) -> None:
        self._write({"lengthen": seq.order, "output": output_tokens})
        self.scheduler.lengthen(seq, output_tokens)

    def profile(self, prefill: tuple[tuple[int, float], ...], decode: tuple[tuple[int, int, float], ...]) -> None:
        self._write({"profile": [prefill, decode]})
        self.scheduler.profile(prefill, decode)

    def learn(self, steps: tuple[StepTime, ...]) -> None:
        self._write({"learn": steps})
        self.scheduler.learn(steps)

    def next_batch(self, now: float) -> Batch | None:
        self.advanced = 0
        batch = self.scheduler.next_batch(now)
        if batch is not None:
            self._write({"batch": decided(batch), "now": now})
        return batch

    def draft(self, seq: Sequence, tokens: int) -> int:
        if self.advanced:
            self._write({"advance": self.advanced})
            self.advanced = 0
        taken = self.scheduler.draft(seq, tokens)
        self._write({"draft": seq.order, "tokens": tokens, "taken": taken})
        return taken

    def accept(self, seq: Sequence, tokens: int) -> None:
        self._write({"accept": seq.order, "tokens": tokens})
        self.scheduler.accept(seq, tokens)

    def advance(self, batch: Batch, steps: int) -> None:
        self.advanced += steps
        self.scheduler.advance(batch, steps)

    def complete(self, batch: Batch, steps: int, now: float) -> tuple[list[Sequence], list[Sequence]]:
        self._write({"complete": self.advanced + steps})
        return self.scheduler.complete(batch, steps, now)


def _aims(seq: Sequence) -> dict[str, Any]:
    """JSON has no infinity."""
    aims = (seq.arrived_s, seq.ttft_slo_s, seq.tpot_slo_s)
    told: dict[str, Any] = {"offline": True} if seq.offline else {}
    return told | {"aims": [None if x == inf else x for x in aims]} if min(aims[1:]) < inf else told


def _aimed(seq: Sequence, rest: dict[Any, Any]) -> Sequence:
    seq.offline = bool(rest.get("offline"))
    if aims := rest.get("aims"):
        seq.aim(*(inf if x is None else float(x) for x in aims))
    return seq


def decided(batch: Batch) -> list[Any]:
    """A batch as the log has it."""
    return [[[seq.order, tokens] for seq, tokens in batch.chunks], batch.decodes, batch.repeat]


def replay(lines: Iterable[bytes]) -> tuple[int, str]:
    """Feed a log to a fresh Scheduler. Returns (batches decided alike, the first difference or ""). Raises UsageError on a line that is
    not of such a log."""
    reader = iter(lines)
    alike, number = 0, 1
    sequences: dict[int, Sequence] = {}
    batch: Batch | None = None
    try:
        setup = _read_setup(next(reader))
        fresh = setup.scheduler()
        for number, raw in enumerate(reader, 2):
            match msgspec.json.decode(raw):
                case {"submit": [order, prompt, output, priority, decodes_here], **rest}:
                    hashes: Any = rest.get("hashes", ())
                    seq = _aimed(Sequence(0, 0, prompt, output, tuple(hashes), priority, decodes_here=decodes_here), rest)
                    fresh.submit(seq)
                    sequences[order] = seq
                    if seq.order != order:
                        return alike, f"line {number}: submission {order} is number {seq.order} here"
                case {"reserve": [order, prompt, output, priority, made], "hashes": named, **rest}:
                    seq = _aimed(Sequence(0, 0, prompt, output, tuple(named), priority, made=made), rest)
                    if (seq.order if fresh.reserve(seq) else 0) != order:
                        return alike, f"line {number}: reserved {'by the log' if order else 'here'} only"
                    sequences[order] = seq
                case {"arrive": order, "missing": missing}:
                    fresh.arrive(sequences[order], missing)
                case {"hold": order}:
                    fresh.hold(sequences[order])
                case {"stay": order, **rest}:
                    again: Any = rest.get("missing", 0)
                    fresh.stay(sequences[order], again)
                case {"lengthen": order, "output": output}:
                    fresh.lengthen(sequences[order], output)
                case {"lend": order, "tokens": tokens, "hashes": hashes}:
                    seq = Sequence(0, 0, tokens, 1, tuple(hashes), decodes_here=False)
                    if fresh.lend(seq) != bool(order):
                        return alike, f"line {number}: lent {'by the log' if order else 'here'} only"
                    sequences[order] = seq
                case {"extend": order, "tokens": tokens, "taken": taken}:
                    if fresh.extend(sequences[order], tokens) != taken:
                        return alike, f"line {number}: extended {'by the log' if taken else 'here'} only"
                case {"draft": order, "tokens": tokens, "taken": taken}:
                    if (room := fresh.draft(sequences[order], tokens)) != taken:
                        return alike, f"line {number}: {taken} drafted tokens had room, here {room}"
                case {"accept": order, "tokens": tokens}:
                    fresh.accept(sequences[order], tokens)
                case {"release": order}:
                    fresh.release(sequences[order])
                case {"rename": order, "hashes": hashes}:
                    fresh.rename(sequences[order], tuple(hashes))
                case {"remove": order}:
                    fresh.remove(sequences[order])
                case {"profile": [prefill, decode]}:
                    fresh.profile(*msgspec.convert((prefill, decode), PROFILES))
                case {"learn": steps}:
                    fresh.learn(msgspec.convert(steps, tuple[StepTime, ...]))
                case {"batch": recorded, "now": now}:
                    batch = fresh.next_batch(now)
                    here = None if batch is None else decided(batch)
                    if here != recorded:
                        return alike, f"line {number}: the log has {recorded}, decided here was {here}"
                    alike += 1
                case {"advance": steps} if batch is not None:
                    fresh.advance(batch, steps)
                case {"complete": steps} if batch is not None:
                    fresh.complete(batch, steps, 0.0)
                case _:
                    raise ValueError("not a scheduler's decision")
    except (StopIteration, msgspec.MsgspecError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"line {number} of the decision log cannot be replayed: {error or 'it is empty'}") from None
    return alike, ""
