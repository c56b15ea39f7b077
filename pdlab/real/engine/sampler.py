"""From logits to tokens. Greedy rows take one argmax together; the rest is vectorised over the batch, with a draw of its own for each row.

A row's draw is one uniform number from the generator of its own sequence, and the token is where the cumulative distribution passes it, so
that what else is in the batch does not matter. Order as in vLLM: bias, bans, penalties, grammar, temperature, then min-p, top-k, top-p.

A row may bring a token that was drawn from another distribution q: it is taken with probability min(1, p / q), else one is drawn from what
p has more than q. What comes out is distributed as p. Source: Leviathan et al. (2023), appendix A.1; Chen et al. (2023), algorithm 2.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pdlab.real.engine.grammar import Matcher
from pdlab.real.engine.messages import Sampling, Scored


@dataclass(slots=True)
class SamplerRow:
    """What sampling needs of a sequence. `output` counts its tokens made so far, `recent` are the last of them, as far as bad words look
    back; `prompt` are the distinct tokens of its prompt. All are kept only where something asks for them."""

    sampling: Sampling
    generator: random.Random
    stop_ids: tuple[int, ...]  # that end it, end-of-sequence among them
    made: int = 0
    output: dict[int, int] = field(default_factory=dict)
    prompt: tuple[int, ...] = ()
    grammar: Matcher | None = None
    recent: tuple[int, ...] = ()
    longest: int = 0  # of its sampling's bad words, in tokens
    allowed: Tensor | None = None  # its sampling's, on the device, since the first step

    def __post_init__(self) -> None:
        self.longest = max((len(word) for spellings in self.sampling.bad_words.values() for word in spellings), default=0)

    @property
    def drawn(self) -> bool:
        return self.sampling.temperature > 0

    def draft_draws(self, count: int) -> list[float]:
        """What its next tokens are drafted with: of a seeded request the draws that those tokens will be made with, which stay to be taken;
        of others, draws of their own."""
        if not self.drawn:
            return []
        source = self.generator
        if self.sampling.seed is not None:
            source = random.Random(0)
            source.setstate(self.generator.getstate())
        return [source.random() for _ in range(count)]

    @property
    def plain(self) -> bool:
        """Does nothing alter its logits?"""
        s = self.sampling
        banned = self.made < s.min_tokens and self.stop_ids
        return not (s.logit_bias or self.penalised or self.grammar or banned or s.allowed_token_ids or s.bad_words)

    @property
    def penalised(self) -> bool:
        s = self.sampling
        return bool(s.presence_penalty or s.frequency_penalty or s.repetition_penalty != 1.0)

    def count(self, token: int) -> None:
        self.made += 1
        if self.penalised:
            self.output[token] = self.output.get(token, 0) + 1
        if self.grammar is not None:
            self.grammar.count(token)
        if self.sampling.bad_words:
            self.recent = (*self.recent, token)[-self.longest :]

    def banned(self) -> list[int]:
        """Tokens that may not come next: those that would end it too soon, and the last ones of bad words of which the rest is made."""
        found = list(self.stop_ids) if self.made < self.sampling.min_tokens else []
        for spellings in self.sampling.bad_words.values():
            for *before, last in spellings:
                if not before or self.recent[-len(before) :] == tuple(before):
                    found.append(last)
        return found


@dataclass(frozen=True, slots=True)
class Sampled:
    """`logprobs` and `top` are there where the row's sampling asks for them: its token's log-probability, and (token, log-probability)
    of the likeliest, by the model's own softmax."""

    token: int
    logprob: float | None = None
    top: list[tuple[int, float]] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Proposal:
    """A drafted token. `odds`: what it was drawn from, float32 [vocab], which sums to one; None: it stands if it is the token that the
    row's own draw makes."""

    token: int
    odds: Tensor | None = None


def propose(logits: Tensor, rows: Sequence[SamplerRow], draws: Sequence[float]) -> list[Proposal]:
    """A draft for each row from the drafter's `logits`, float32 [rows, vocab]: the likeliest where the row is greedy, else drawn as its
    temperature, min-p, top-k and top-p say, by its number of `draws`. What else alters a row's logits is left to the verification."""
    found = [Proposal(token) for token in logits.argmax(-1).tolist()]
    seeded = [i for i, row in enumerate(rows) if row.drawn and row.sampling.seed is not None]
    if seeded:
        tokens = _draw(logits[seeded], [rows[i].sampling for i in seeded], [draws[i] for i in seeded])
        for i, token in zip(seeded, tokens, strict=True):
            found[i] = Proposal(token)
    free = [i for i, row in enumerate(rows) if row.drawn and row.sampling.seed is None]
    if free:
        odds = distribution(logits[free], [rows[i].sampling for i in free])
        tokens = _pick(odds.double().cumsum(-1), _column([draws[i] for i in free], odds))
        for i, token, own in zip(free, tokens, odds, strict=True):
            found[i] = Proposal(token, own)
    return found


def sample(logits: Tensor, rows: Sequence[SamplerRow], proposals: Sequence[Proposal | None] = ()) -> list[Sampled]:
    """One token for each row of `logits`, float32 [rows, vocab], with what is drafted for each, where anything is."""
    if not rows:
        return []
    wanted = [i for i, row in enumerate(rows) if row.sampling.logprobs is not None]
    raw = logits[wanted].log_softmax(-1) if wanted else None
    altered = [i for i, row in enumerate(rows) if not row.plain]
    if altered:
        computed, logits = logits, logits.clone()
        for i in altered:
            _alter(logits[i], rows[i])
        if constrained := [i for i in altered if rows[i].grammar is not None]:
            _constrain(logits, computed, constrained, rows)
    verified = [i for i, proposal in enumerate(proposals) if proposal is not None and proposal.odds is not None]
    others = set(range(len(rows))).difference(verified)
    drawn = [i for i in sorted(others) if rows[i].drawn]
    if len(drawn) == len(rows):
        tokens: list[int] = _drawn(logits, rows)
    else:
        tokens = logits.argmax(-1).tolist() if others else [0] * len(rows)
        if drawn:
            for i, token in zip(drawn, _drawn(logits[drawn], [rows[i] for i in drawn]), strict=True):
                tokens[i] = token
        if verified:
            found = _verified(logits[verified], [rows[i] for i in verified], [p for i in verified if (p := proposals[i]) is not None])
            for i, token in zip(verified, found, strict=True):
                tokens[i] = token
    sampled = [Sampled(token) for token in tokens]
    if raw is not None:
        for at, i in enumerate(wanted):
            sampled[i] = _with_logprobs(raw[at], tokens[i], rows[i].sampling.logprobs or 0)
    return sampled


def score(logits: Tensor, targets: Sequence[int], alternatives: int) -> list[Scored]:
    """What each row of `logits`, float32 [targets, vocab], says of its target."""
    if not len(targets):
        return []
    logprobs = logits.log_softmax(-1)
    own = logprobs.gather(1, torch.tensor(list(targets), device=logits.device).unsqueeze(1))
    ranks = (logprobs >= own).sum(-1).tolist()
    if not alternatives:
        return [Scored(logprob, rank, []) for logprob, rank in zip(own.squeeze(1).tolist(), ranks, strict=True)]
    values, ids = logprobs.topk(min(alternatives, logits.shape[1]))
    tops = [list(zip(*row, strict=True)) for row in zip(ids.tolist(), values.tolist(), strict=True)]
    return [Scored(*row) for row in zip(own.squeeze(1).tolist(), ranks, tops, strict=True)]


def _with_logprobs(raw: Tensor, token: int, count: int) -> Sampled:
    if not count:
        return Sampled(token, raw[token].item(), [])
    values, ids = raw.topk(min(count, len(raw)))
    return Sampled(token, raw[token].item(), list(zip(ids.tolist(), values.tolist(), strict=True)))


def _constrain(logits: Tensor, computed: Tensor, constrained: list[int], rows: Sequence[SamplerRow]) -> None:
    """Take away what the grammars of these rows do not allow next, in place. Where bans leave nothing of what one allows (the end before
    `min_tokens`), the row is as it was `computed`."""
    words = np.zeros((len(constrained), -(-logits.shape[1] // 32)), np.int32)
    for bits, i in zip(words, constrained, strict=True):
        grammar = rows[i].grammar
        assert grammar is not None
        grammar.fill(bits)
    np.invert(words, out=words)
    unpacked = np.unpackbits(words.view(np.uint8), axis=1, count=logits.shape[1], bitorder="little")
    forbidden = torch.from_numpy(unpacked.view(np.bool_)).to(logits.device)
    best = torch.stack([logits[i].masked_fill_(mask, -torch.inf).amax() for i, mask in zip(constrained, forbidden, strict=True)])
    for i, mask, left in zip(constrained, forbidden, best.tolist(), strict=True):
        if left == -torch.inf:
            logits[i] = computed[i].masked_fill(mask, -torch.inf)


def _alter(logits: Tensor, row: SamplerRow) -> None:
    s = row.sampling
    if s.allowed_token_ids:
        if row.allowed is None:
            row.allowed = torch.tensor(s.allowed_token_ids, device=logits.device)
        kept = logits[row.allowed]
        logits.fill_(-torch.inf)
        logits[row.allowed] = kept
    if s.logit_bias:
        ids = torch.tensor(list(s.logit_bias), device=logits.device)
        logits[ids] += torch.tensor(list(s.logit_bias.values()), device=logits.device)
    if banned := row.banned():
        _ban(logits, banned, row.allowed)
    if row.grammar is not None and s.ignore_eos:
        logits[list(row.grammar.eos_ids)] = -torch.inf
    if s.repetition_penalty != 1.0:
        ids = torch.tensor(sorted({*row.prompt, *row.output}), device=logits.device)
        if len(ids):
            seen = logits[ids]
            logits[ids] = torch.where(seen > 0, seen / s.repetition_penalty, seen * s.repetition_penalty)
    if row.output and (s.presence_penalty or s.frequency_penalty):
        ids = torch.tensor(list(row.output), device=logits.device)
        counts = torch.tensor(list(row.output.values()), device=logits.device, dtype=torch.float32)
        logits[ids] -= s.frequency_penalty * counts + s.presence_penalty


def _ban(logits: Tensor, tokens: list[int], allowed: Tensor | None) -> None:
    """Where that leaves nothing of what is allowed, what is allowed stays."""
    before = logits[allowed] if allowed is not None else None
    logits[tokens] = -torch.inf
    if allowed is not None and before is not None and bool((logits[allowed] == -torch.inf).all()):
        logits[allowed] = before


def distribution(logits: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """What each row is drawn from, float32 [rows, vocab], which sums to one."""
    probs = _tempered(logits, samplings)
    if filtered := _filtered(samplings):
        ordered, ids = _likeliest(probs[filtered], [samplings[i] for i in filtered])
        probs[filtered] = torch.zeros_like(ordered).scatter_(1, ids, ordered)
    return probs / probs.sum(-1, keepdim=True)


def _verified(logits: Tensor, rows: Sequence[SamplerRow], proposals: Sequence[Proposal]) -> list[int]:
    """What is drafted, or what is drawn instead."""
    p, q = distribution(logits, [row.sampling for row in rows]), torch.stack([one.odds for one in proposals if one.odds is not None])
    tokens = [one.token for one in proposals]
    at = torch.tensor(tokens, device=logits.device).unsqueeze(1)
    accepted = (p.gather(1, at) / q.gather(1, at)).squeeze(1).tolist()
    refused = [i for i, row in enumerate(rows) if row.generator.random() >= accepted[i]]
    if refused:
        more = (p[refused] - q[refused]).clamp_(min=0.0)
        more = torch.where(more.sum(-1, keepdim=True) > 0.0, more, p[refused])  # they differ by rounding alone
        instead = _pick(more.double().cumsum(-1), _column([rows[i].generator.random() for i in refused], more))
        for i, token in zip(refused, instead, strict=True):
            tokens[i] = token
    return tokens


def _drawn(logits: Tensor, rows: Sequence[SamplerRow]) -> list[int]:
    return _draw(logits, [row.sampling for row in rows], [row.generator.random() for row in rows])


def _draw(logits: Tensor, samplings: Sequence[Sampling], draws: Sequence[float]) -> list[int]:
    probs, u, filtered = _tempered(logits, samplings), _column(draws, logits), _filtered(samplings)
    picked = _pick(probs.double().cumsum(-1), u) if len(filtered) < len(samplings) else [0] * len(samplings)
    if filtered:
        ordered, ids = _likeliest(probs[filtered], [samplings[i] for i in filtered])
        ranks = torch.tensor(_pick(ordered.double().cumsum(-1), u[filtered]), device=logits.device).unsqueeze(1)
        for i, token in zip(filtered, ids.gather(1, ranks).squeeze(1).tolist(), strict=True):
            picked[i] = token
    return picked


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    """float64 [values, 1]"""
    return torch.tensor(values, device=like.device, dtype=torch.float64).unsqueeze(1)


def _filtered(samplings: Sequence[Sampling]) -> list[int]:
    """The rows that are drawn among the likeliest only."""
    return [i for i, s in enumerate(samplings) if s.top_p < 1 or s.top_k]


def _tempered(logits: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """What temperature and min-p leave, float32 [rows, vocab]."""
    probs = (logits / _column([max(s.temperature, 1e-5) for s in samplings], logits).float()).softmax(-1)
    if any(s.min_p > 0 for s in samplings):
        floor = _column([s.min_p for s in samplings], logits).float() * probs.amax(-1, keepdim=True)
        probs = probs.masked_fill(probs < floor, 0.0)
    return probs


def _likeliest(probs: Tensor, samplings: Sequence[Sampling]) -> tuple[Tensor, Tensor]:
    """What top-k and top-p leave of float32 [rows, vocab], in descending order, and its tokens."""
    device = probs.device
    ordered, ids = probs.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(ordered.shape[1], device=device)
    most = torch.tensor([s.top_k or ordered.shape[1] for s in samplings], device=device).unsqueeze(1)
    ordered = ordered.masked_fill(rank >= most, 0.0)
    total = ordered.double().cumsum(-1)
    bound = _column([s.top_p for s in samplings], probs).float().double() * total[:, -1:]
    return ordered.masked_fill(total - ordered >= bound, 0.0), ids  # a token stays while those before it are short of top_p


def _pick(total: Tensor, u: Tensor) -> list[int]:
    """The first index whose cumulative weight exceeds u of the whole. `total` float64 [rows, n], `u` float64 [rows, 1] below 1."""
    target = u * total[:, -1:]
    picked = torch.searchsorted(total, target, right=True).clamp(max=total.shape[1] - 1)
    return [int(i) for i in picked.squeeze(1).tolist()]
