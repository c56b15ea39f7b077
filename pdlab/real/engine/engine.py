"""The engine's core: what its Worker says is run on the device, sampled, and told. No clock, no sockets: a process around it has those.

    engine.submit(message); engine.cancel(id); engine.step(now, emit, interrupted)

A decode batch is run `Batch.repeat` times without asking again, unless a sequence stops early or news have come.
"""

from __future__ import annotations

import random
from collections import abc
from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from pdlab.core.batch import Batch
from pdlab.core.prefix import chain
from pdlab.core.sequence import Sequence
from pdlab.core.worker import Worker
from pdlab.real.engine.candidate import Candidate
from pdlab.real.engine.grammar import GrammarError, Grammars
from pdlab.real.engine.messages import Step, Submit, Tokens
from pdlab.real.engine.runner import Piece, Runner
from pdlab.real.engine.sampler import Proposal, Sampled, SamplerRow, sample
from pdlab.real.engine.speculation import Speculation, joined

Emit = Callable[[list[Tokens]], None]
AfterLayer = Callable[[int], None]


class Pusher(Protocol):
    """Sends KV off while it is computed."""

    def begins(self, chunks: list[tuple[Sequence, int]]) -> AfterLayer | None:
        """A pass over these prompt chunks begins; what is returned is called when a layer's KV is there."""
        ...

    def ends(self, chunks: list[tuple[Sequence, int]]) -> None:
        """It has ended; `computed` of the sequences does not count it yet."""
        ...


class Engine:
    """`eos_ids` end a sequence unless it ignores them; `seed` is for requests that bring none; after `step_limit` passes at the latest the
    worker is asked again. `ttft_slo_s` and `tpot_slo_s` are the objectives of requests that bring none."""

    def __init__(
        self,
        runner: Runner,
        worker: Worker,
        *,
        eos_ids: frozenset[int],
        seed: int = 0,
        step_limit: int = 1 << 30,
        ttft_slo_s: float = 1.0,
        tpot_slo_s: float = 0.05,
    ) -> None:
        self.runner = runner
        self.worker = worker
        self.scheduler = worker.scheduler
        self.eos_ids = tuple(sorted(eos_ids))
        self.step_limit = step_limit
        self.ttft_slo_s, self.tpot_slo_s = ttft_slo_s, tpot_slo_s
        self.seeds = random.Random(seed)
        self.groups: dict[int, dict[int, Candidate]] = {}  # live candidates by index, of each request that is here
        self.news: list[Tokens] = []  # that no step has brought: refusals, cancellations
        self.pusher: Pusher | None = None
        self.speculation: Speculation | None = None
        self.grammars: Grammars | None = None  # when the vocabulary is known
        self.batch: Batch | None = None  # of the pass that is under way, or has ended and is about to be told
        self.joined = 0  # of its decodes, how many had their first in it
        self.each = 1.0  # tokens that each of its decodes has made, in the mean
        self.prompt_tokens = self.prefix_queries = self.prefix_hits = 0

    def warm_up(self) -> None:
        """As Runner's, of all that runs here."""
        self.runner.warm_up()
        if self.speculation is not None:
            self.speculation.drafter.warm_up()

    @property
    def idle(self) -> bool:
        """Nothing is to be done; KV may wait here to be read."""
        return not self.news and len(self.groups) == len(self.scheduler.held)

    def holds(self, id: int) -> bool:
        """Is its KV held here, for others to read?"""
        return any(c.seq in self.scheduler.held for c in self.groups.get(id, {}).values())

    @property
    def runnable(self) -> bool:
        """Is there something for `step` to do, or to try?"""
        s = self.scheduler
        return bool(self.news or s.running or s.waiting or s.prefilling or s.landed)

    # ------------------------------------------------------------ requests

    def submit(self, submit: Submit, now: float) -> None:
        """Take a request in, at `now`. One that can never run is answered with an error, at the next step."""
        if reason := self.impossible(submit):
            self.news += [Tokens(submit.id, i, 0, [], "error", error=reason) for i in range(max(submit.sampling.best_of, 1))]
            return
        c, others = self.enter(submit, now)
        self.worker.submit(c.seq, others)

    def enter(self, submit: Submit, now: float) -> tuple[Candidate, list[Sequence]]:
        """A request's first candidate, and the sequences of its others."""
        group = self.groups[submit.id] = {index: self.candidate(submit, index, now) for index in range(submit.sampling.best_of)}
        return group[0], [c.seq for c in group.values() if c.index]

    def impossible(self, submit: Submit) -> str:
        """Why it can never run here, or ""."""
        s, vocab = submit.sampling, self.runner.model.config.vocab
        if submit.id in self.groups:
            return f"request {submit.id} is already here"
        if not submit.tokens:
            return "the prompt is empty"
        if s.max_tokens < 1 or s.best_of < 1:
            return f"max_tokens {s.max_tokens} and best_of {s.best_of} must be at least 1"
        if not submit.decodes_here and s.best_of > 1:
            return f"best_of {s.best_of} is for the instance that decodes"
        if reason := self.worker.refusal(len(submit.tokens), s.max_tokens):
            return reason
        spelled = [token for spellings in s.bad_words.values() for word in spellings for token in word]
        named = (*submit.tokens, *s.stop_token_ids, *s.logit_bias, *s.allowed_token_ids, *spelled)
        wrong = next((t for t in named if not 0 <= t < vocab), None)
        if wrong is not None:
            return f"token {wrong} is not in the vocabulary of {vocab}"
        return self.unreadable(submit)

    def unreadable(self, submit: Submit) -> str:
        """Why its grammar cannot be followed here, or ""."""
        structured = submit.sampling.structured
        if structured is None:
            return ""
        if self.grammars is None:
            return "structured outputs need the vocabulary, which this engine was not told"
        try:
            self.grammars.ensure(structured)
        except GrammarError as error:
            return f"structured_outputs: {error}"
        return ""

    def candidate(self, submit: Submit, index: int, now: float) -> Candidate:
        s = submit.sampling
        seed = self.seeds.getrandbits(64) if s.seed is None else s.seed
        stop_ids = s.stop_token_ids if s.ignore_eos else (*s.stop_token_ids, *self.eos_ids)
        row = SamplerRow(s, random.Random(f"{seed}/{index}"), stop_ids)
        if s.repetition_penalty != 1.0:
            row.prompt = tuple(set(submit.tokens))
        if s.structured is not None and self.grammars is not None:
            row.grammar = self.grammars.matcher(s.structured)
        output = s.max_tokens if submit.decodes_here else max(s.max_tokens, 2)  # what is held has more to come, elsewhere
        hashes = submit.hashes if s.prompt_logprobs is None else ()  # the prefix cache would leave positions out
        seq = Sequence(submit.id, index, len(submit.tokens), output, hashes, submit.priority, decodes_here=submit.decodes_here)
        candidate = Candidate(submit, index, list(submit.tokens), row, seq, now if submit.sent_s is None else submit.sent_s)
        seq.owner = candidate
        ttft_slo_s = self.ttft_slo_s if submit.ttft_slo_s is None else submit.ttft_slo_s
        seq.aim(candidate.submitted_s - submit.waited_s, ttft_slo_s, self.tpot_slo_s if submit.tpot_slo_s is None else submit.tpot_slo_s)
        seq.offline = submit.offline
        if s.prompt_logprobs is not None and not index:
            candidate.scores = []
        return candidate

    def cancel(self, id: int, candidate: int = -1) -> None:
        """Drop a request, or one candidate of it; what has ended already stays so."""
        group = self.groups.get(id, {})
        dropped = [c for c in group.values() if candidate in (-1, c.index)]
        for c in dropped:
            self.news.append(Tokens(id, c.index, c.row.made, [], "abort"))
        if len(dropped) == len(group):
            self.drop(id)
        else:
            for c in dropped:
                self.name_blocks(c)
                self.worker.withdraw(c.seq)
                self._end(c)

    def drop(self, id: int) -> None:
        """Forget a request without a word; what has ended stays so."""
        group = self.groups.pop(id, {})
        for c in group.values():
            self.name_blocks(c)
        for c in group.values():
            self.worker.abort(c.seq)  # and its others
            break

    def _end(self, c: Candidate) -> None:
        group = self.groups[c.id]
        del group[c.index]
        c.seq.owner = None  # no cycle for the collector
        if not group:
            del self.groups[c.id]

    def name_blocks(self, c: Candidate) -> None:
        """Let the prefix cache keep what the sequence has made, too: the next turn of a conversation starts with it."""
        if c.seq.hashes and c.row.made:
            self.worker.grown(c.seq, chain(c.tokens, self.runner.block_tokens))

    # ------------------------------------------------------------ the step

    def step(self, now: float, emit: Emit, interrupted: Callable[[], bool]) -> bool:
        """Run the next batch, as often as it repeats; `emit` gets the tokens of each pass at once. `interrupted` says whether news wait.
        False: nothing could be run, for want of blocks."""
        self.batch = None
        if self.news:
            news, self.news = self.news, []
            emit(news)
        scheduler, worker = self.scheduler, self.worker
        batch = worker.next_batch(now)
        for victim in scheduler.victims:
            victim.owner.table = ()
        if batch is None:
            return False
        self.batch, self.joined = batch, len(scheduler.joined)
        passes = 1
        while True:
            computed = [seq.owner for seq, tokens in batch.chunks if seq.computed + tokens == seq.prompt_tokens]
            decoding = [seq.owner for seq in scheduler.running.values()] if batch.decodes else []
            drafts = self._drafts(batch, decoding)
            sampling = [*computed, *decoding]
            pieces = [*self._chunks(batch.chunks, now), *map(self._next_tokens, decoding, drafts)]
            pusher = self.pusher if batch.chunks else None
            logits = self._run(pieces, batch.chunks, pusher.begins(batch.chunks) if pusher is not None else None)
            if pusher is not None:
                pusher.ends(batch.chunks)
            outputs = self._sampled(logits, computed, decoding, drafts)
            self.each = sum(len(output.tokens) for output in outputs[len(computed) :]) / max(len(decoding), 1) or 1.0
            self._settle(decoding, drafts, outputs[len(computed) :])
            ended = [(c, o) for c, o in zip(sampling, outputs, strict=True) if o.finish]
            if ended or self.each > 1.0 or batch.repeat == 1 or passes >= self.step_limit or interrupted():
                break
            emit(outputs)
            worker.advance(batch, 1)
            self.batch, self.joined = batch, 0
            passes += 1
        for c, _ in ended:
            self.name_blocks(c)
        worker.complete(batch, 1, now, [c.seq for c, output in ended if output.finish != "held"])
        worker.settle()
        for c, output in ended:
            if output.finish == "held":
                c.held = output
            else:
                self._end(c)
        emit(outputs)
        return True

    def _run(self, pieces: list[Piece], chunks: list[tuple[Sequence, int]], after_layer: AfterLayer | None) -> Tensor:
        """The logits that are sampled from; the scores of prompts are booked."""
        if not any(piece.targets for piece in pieces):
            return self.runner.run(pieces, after_layer)
        logits, scores = self.runner.score(pieces, after_layer)
        for (seq, _), found in zip(chunks, scores, strict=False):  # chunks come first among the pieces
            if found:
                seq.owner.scores[seq.computed :] = found
        return logits

    def _chunks(self, chunks: list[tuple[Sequence, int]], now: float) -> list[Piece]:
        pieces = []
        for seq, tokens in chunks:
            c: Candidate = seq.owner
            start, end = seq.computed, seq.computed + tokens
            if not c.table:
                c.table = self.scheduler.table(seq)
            if c.admitted_s < 0:
                c.admitted_s = now
                self.prefix_queries += seq.prompt_tokens if seq.hashes else 0
                self.prefix_hits += seq.cached_tokens
            self.prompt_tokens += tokens
            pieces.append(Piece(c.tokens[start:end], start, c.table, end == seq.prompt_tokens, *_wanted(c, start, end)))
        return pieces

    def _next_tokens(self, c: Candidate, drafted: list[Proposal]) -> Piece:
        start = len(c.tokens) - 1
        self._reach(c, start + len(drafted))
        return Piece([*c.tokens[-1:], *(proposal.token for proposal in drafted)], start, c.table, 1 + len(drafted))

    def _reach(self, c: Candidate, position: int) -> None:
        """Its table has the block of that position."""
        if position >= len(c.table) * self.runner.block_tokens:
            c.table = self.scheduler.table(c.seq)

    # ------------------------------------------------------------ drafts

    def _drafts(self, batch: Batch, decoding: list[Candidate]) -> list[list[Proposal]]:
        """What each of them verifies in this pass, with what the batch leaves of its budget."""
        budget = self.scheduler.max_batch_tokens - batch.prompt_tokens - batch.decodes
        if self.speculation is None or budget <= 0:
            return [[] for _ in decoding]
        room = []
        for c in decoding:
            most = min(self.speculation.tokens, c.left - 1, budget)
            most = self.worker.draft(c.seq, most) if most > 0 else 0
            self._reach(c, len(c.tokens) - 1 + most)
            budget -= most
            room.append(most)
        drafts = self.speculation.drafter.draft(decoding, room)
        for c, most, drafted in zip(decoding, room, drafts, strict=True):
            if most and not drafted:
                self.worker.accept(c.seq, 0)
                self._cut(c)
        return drafts

    def _sampled(self, logits: Tensor, computed: list[Candidate], decoding: list[Candidate], drafts: list[list[Proposal]]) -> list[Tokens]:
        """What the pass has made of each, from its rows of the logits, in order: one, or as many as its drafts came true, and one more."""
        sampling = [*computed, *decoding]
        if not any(drafts):
            return [self._take(c, s) for c, s in zip(sampling, sample(logits, [c.row for c in sampling]), strict=True)]
        verified: list[list[Proposal]] = [*([] for _ in computed), *drafts]
        rows, row = list[int](), 0
        for drafted in verified:
            rows.append(row)
            row += 1 + len(drafted)
        made: list[list[Tokens]] = [[] for _ in sampling]
        alive, position = list(range(len(sampling))), 0
        while alive:
            proposals = [verified[i][position] if position < len(verified[i]) else None for i in alive]
            drawn = sample(logits[[rows[i] + position for i in alive]], [sampling[i].row for i in alive], proposals)
            for i, sampled in zip(alive, drawn, strict=True):
                made[i].append(self._take(sampling[i], sampled))
            alive = [
                i
                for i, proposal in zip(alive, proposals, strict=True)
                if proposal is not None and made[i][-1].tokens == [proposal.token] and not made[i][-1].finish
            ]
            position += 1
        return [joined(parts) for parts in made]

    def _settle(self, decoding: list[Candidate], drafts: list[list[Proposal]], outputs: list[Tokens]) -> None:
        """The books take in what was accepted."""
        for c, drafted, output in zip(decoding, drafts, outputs, strict=True):
            if drafted and self.speculation is not None:
                accepted = max(len(output.tokens) - 1, 0)
                self.speculation.count(len(drafted), accepted)
                self.worker.accept(c.seq, accepted)
                self._cut(c)

    def _cut(self, c: Candidate) -> None:
        """Blocks of drafts that were wrong are not its own any more."""
        c.table = c.table[: self.scheduler.pool.blocks(self.scheduler.kv_tokens(c.seq) + 1)]

    def _take(self, c: Candidate, sampled: Sampled) -> Tokens:
        """Book a token, and say so."""
        token = sampled.token
        start, grammar = c.row.made, c.row.grammar
        if grammar is not None and grammar.error:
            return Tokens(c.id, c.index, start, [], "error", error=grammar.error)
        scores, c.scores = c.scores, None
        c.tokens.append(token)
        c.row.count(token)
        finish = None
        if token in c.row.stop_ids or (grammar is not None and grammar.ended):
            finish = "stop"
        elif not c.submit.decodes_here:
            finish = "held"
        elif c.row.made >= c.submit.sampling.max_tokens:
            finish = "length"
        return Tokens(
            c.id,
            c.index,
            start,
            [token],
            finish,
            None if sampled.logprob is None else [sampled.logprob],
            None if sampled.top is None else [sampled.top],
            cached_tokens=c.seq.cached_tokens,
            queue_s=c.admitted_s - c.submitted_s,
            prompt=scores,
        )

    # ------------------------------------------------------------ what it says of itself

    def load(self, outputs: list[Tokens], at_s: float) -> Step:
        """The outputs, with the load and the counters as they are now."""
        report = self.worker.report(at_s)
        return Step(
            outputs,
            report,
            0 if self.groups else report.used_blocks,
            self.prompt_tokens,
            self.prefix_queries,
            self.prefix_hits,
            leases=len(self.scheduler.held),
            idle=self.worker.idle,
            drafts=0 if self.speculation is None else self.speculation.drafts,
            drafted_tokens=0 if self.speculation is None else self.speculation.drafted,
            accepted_tokens=[] if self.speculation is None else self.speculation.accepted,
        )


def _wanted(c: Candidate, start: int, end: int) -> tuple[abc.Sequence[int], int]:
    """The tokens of the prompt after those from `start` to `end` whose scores are wanted, and how many alternatives to each."""
    if c.scores is None:
        return (), 0
    return c.tokens[start + 1 : min(end + 1, len(c.submit.tokens))], c.submit.sampling.prompt_logprobs or 0
