"""Speculative decoding: tokens are drafted, and the step that computes a sequence's next token verifies them.

Each position is sampled as it would be without drafts, with the draw that is its own; a drafted token stands where it is the one that was
sampled. So a greedy or a seeded request's tokens are those it would have without, wherever it goes on. For a draft that is one token this
accepts as often as rejection sampling does (Leviathan et al., 2023, with a draft of one token's probability 1). A model drafts for a seeded
request with the draws that are to come, so that two that agree draw alike. For one without a seed it draws on its own, and the draft is
taken or refused by `sampler.sample`: as often as can be, and its tokens are distributed as without drafts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from pdlab.real.engine.candidate import Candidate
from pdlab.real.engine.messages import Tokens
from pdlab.real.engine.options import SpeculationOptions
from pdlab.real.engine.runner import Piece, Runner
from pdlab.real.engine.sampler import Proposal, propose


class Drafter(Protocol):
    """Proposes what comes next."""

    def draft(self, candidates: Sequence[Candidate], most: Sequence[int]) -> list[list[Proposal]]:
        """For each, at most so many tokens. Their blocks are taken, for their tables to reach."""
        ...

    def warm_up(self) -> None:
        """As Runner's."""
        ...


@dataclass(slots=True)
class NgramIndex:
    """Where each n-gram of a sequence first ended, as far as `seen` tokens."""

    ends: dict[tuple[int, ...], int] = field(default_factory=dict)
    seen: int = 0


class NgramDrafter:
    """The tokens that followed the first occurrence of the sequence's last `most` tokens, or of fewer, down to `least`. Source: prompt
    lookup decoding (Saxena, 2023), as vLLM's `ngram`."""

    def __init__(self, least: int, most: int) -> None:
        self.lengths = range(most, least - 1, -1)

    def draft(self, candidates: Sequence[Candidate], most: Sequence[int]) -> list[list[Proposal]]:
        return [[Proposal(token) for token in self.follow(c, count)] for c, count in zip(candidates, most, strict=True)]

    def warm_up(self) -> None:
        pass

    def follow(self, c: Candidate, count: int) -> list[int]:
        if c.drafting is None:
            c.drafting = NgramIndex()
        index, tokens = c.drafting, c.tokens
        for end in range(index.seen + 1, len(tokens)):  # something follows each
            for n in self.lengths:
                if n <= end:
                    index.ends.setdefault(tuple(tokens[end - n : end]), end)
        index.seen = max(index.seen, len(tokens) - 1)
        for n in self.lengths:
            at = index.ends.get(tuple(tokens[-n:])) if n <= len(tokens) else None
            if at is not None:
                return tokens[at : at + count]
        return []


@dataclass(slots=True)
class DraftedKv:
    """A sequence's tokens whose KV the draft model has: the first `sure`, and then `drafts`, as far as they came true. `preempted`: as it
    was then; the blocks are others after that."""

    preempted: int
    sure: int
    drafts: list[Proposal]


class ModelDrafter:
    """A smaller model of the same vocabulary, sampled as the request is. Its KV lies in blocks of its own memory with the ids of the
    sequence's, so that it needs no books of its own; it is computed here, wherever the sequence has come from. `step_tokens`: of sequences
    it does not know yet, so many tokens at most in a step."""

    def __init__(self, runner: Runner, step_tokens: int) -> None:
        self.runner, self.step_tokens = runner, step_tokens
        self.names: dict[int, int] = {}  # of a block: the prefix hash whose KV it has

    def warm_up(self) -> None:
        self.runner.warm_up()

    def draft(self, candidates: Sequence[Candidate], most: Sequence[int]) -> list[list[Proposal]]:
        found: list[list[Proposal]] = [[] for _ in candidates]
        draws = [c.row.draft_draws(count) for c, count in zip(candidates, most, strict=True)]
        pieces, drafting, budget = list[Piece](), list[int](), self.step_tokens
        for i, (c, count) in enumerate(zip(candidates, most, strict=True)):
            start = self._known(c)
            tokens = min(len(c.tokens) - start, budget)
            if not count or not tokens:
                continue
            whole = start + tokens == len(c.tokens)
            pieces.append(Piece(c.tokens[start : start + tokens], start, c.table, whole))
            budget -= tokens
            self._name(c, start, start + tokens)
            c.drafting = DraftedKv(c.seq.preempted, start + tokens, found[i])
            if whole:
                drafting.append(i)
        position = 0
        while pieces:
            logits = self.runner.run(pieces)
            own = [draws[i][position] if draws[i] else 0.0 for i in drafting]
            for i, proposal in zip(drafting, propose(logits, [candidates[i].row for i in drafting], own), strict=True):
                found[i].append(proposal)
            position += 1
            drafting = [i for i in drafting if position < most[i]]
            pieces = [Piece([found[i][-1].token], len((c := candidates[i]).tokens) + position - 1, c.table, True) for i in drafting]
        return found

    def _known(self, c: Candidate) -> int:
        """Of how many of its first tokens the KV is there. That of the last is computed again at least."""
        state, tokens, block = c.drafting, c.tokens, self.runner.block_tokens
        if state is None or state.preempted != c.seq.preempted:
            units = 0
            for id, name in zip(c.table, c.seq.hashes, strict=False):
                if self.names.get(id) != name:
                    break
                units += 1
            return min(units * block, len(tokens) - 1)
        known: int = state.sure
        for draft in state.drafts[:-1]:  # the last was never fed
            if known >= len(tokens) - 1 or tokens[known] != draft.token:
                break
            known += 1
        return known

    def _name(self, c: Candidate, start: int, end: int) -> None:
        """The KV of these tokens is about to be written."""
        block = self.runner.block_tokens
        for at in range(start // block, len(c.table)):
            if at < min(len(c.seq.hashes), end // block):
                self.names[c.table[at]] = c.seq.hashes[at]
            else:
                self.names.pop(c.table[at], None)


class Speculation:
    """Drafts for the sequences that decode, and what became of them, since start: `drafts` of some tokens each, `drafted` in all,
    `accepted` by position."""

    def __init__(self, drafter: Drafter, tokens: int) -> None:
        self.drafter, self.tokens = drafter, tokens
        self.drafts = self.drafted = 0
        self.accepted = [0] * tokens

    @classmethod
    def of(cls, options: SpeculationOptions, drafts: Runner | None, step_tokens: int) -> Speculation:
        if drafts is not None:
            return cls(ModelDrafter(drafts, step_tokens), options.tokens)
        return cls(NgramDrafter(options.prompt_lookup_min, options.prompt_lookup_max), options.tokens)

    def count(self, drafted: int, accepted: int) -> None:
        """A draft of so many tokens was verified."""
        self.drafts += 1
        self.drafted += drafted
        for position in range(accepted):
            self.accepted[position] += 1


def joined(parts: Sequence[Tokens]) -> Tokens:
    """What a pass made of one candidate, as one message."""
    first, last = parts[0], parts[-1]
    if len(parts) == 1:
        return first
    return msgspec.structs.replace(
        first,
        tokens=[token for part in parts for token in part.tokens],
        finish=last.finish,
        error=last.error,
        logprobs=None if first.logprobs is None else [one for part in parts for one in part.logprobs or ()],
        top=None if first.top is None else [one for part in parts for one in part.top or ()],
    )
