"""Draws follow the softmax that the parameters leave, and each row's draws are its own."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pdlab.real.engine.messages import Sampling
from pdlab.real.engine.sampler import SamplerRow, distribution, propose, sample, score

DRAWS = 20_000


def row(seed: int = 0, stop_ids: tuple[int, ...] = (), **fields: object) -> SamplerRow:
    return SamplerRow(Sampling(**fields), random.Random(seed), stop_ids)  # type: ignore[arg-type]


def counts(logits: Tensor, **fields: object) -> Tensor:
    generator = random.Random(5)
    rows = [SamplerRow(Sampling(**fields), generator, ()) for _ in range(DRAWS)]  # type: ignore[arg-type]
    drawn = Counter(s.token for at in range(0, DRAWS, 2000) for s in sample(logits.expand(2000, -1), rows[at : at + 2000]))
    return torch.tensor([drawn[i] for i in range(logits.shape[-1])], dtype=torch.float64)


def chi_square(seen: Tensor, probs: Tensor) -> float:
    """Divided by its degrees of freedom: about 1 where `seen` follows `probs`."""
    there = probs > 0
    assert seen[~there].sum() == 0
    expected = probs[there].double() * DRAWS
    return float(((seen[there] - expected) ** 2 / expected).sum() / max(int(there.sum()) - 1, 1))


LOGITS = torch.randn(24, generator=torch.Generator().manual_seed(3)) * 1.5


def kept(probs: Tensor, tokens: list[int]) -> Tensor:
    mask = torch.zeros_like(probs)
    mask[tokens] = 1
    return probs * mask / (probs * mask).sum()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    assert chi_square(counts(LOGITS, temperature=temperature), (LOGITS / temperature).softmax(-1)) < 2


@pytest.mark.parametrize("fields", [{}, {"temperature": 0.5, "top_p": 0.9}, {"temperature": 1.5, "top_k": 6, "min_p": 0.05}], ids=str)
def test_what_is_drafted_from_another_distribution_is_distributed_as_its_own(fields: dict[str, float]) -> None:
    """And is taken as often as can be: with probability sum(min(p, q))."""
    drafter = LOGITS + torch.randn(24, generator=torch.Generator().manual_seed(4))
    generator, sampling = random.Random(6), Sampling(**fields)  # type: ignore[arg-type]
    rows, seen, taken = [SamplerRow(sampling, generator, ()) for _ in range(2000)], Counter[int](), 0
    for _ in range(0, DRAWS, len(rows)):
        drafted = propose(drafter.expand(len(rows), -1), rows, [draw for row in rows for draw in row.draft_draws(1)])
        made = [s.token for s in sample(LOGITS.expand(len(rows), -1), rows, drafted)]
        seen.update(made)
        taken += sum(token == proposal.token for token, proposal in zip(made, drafted, strict=True))
    p, q = distribution(torch.stack([LOGITS, drafter]), [sampling, sampling])
    assert chi_square(torch.tensor([seen[i] for i in range(24)], dtype=torch.float64), p) < 2
    most = float(torch.minimum(p, q).sum())
    assert taken / DRAWS == pytest.approx(most, abs=4 * (most * (1 - most) / DRAWS) ** 0.5)


def test_top_k_top_p_and_min_p_leave_the_likeliest() -> None:
    probs = LOGITS.softmax(-1)
    order = probs.argsort(descending=True).tolist()
    assert chi_square(counts(LOGITS, top_k=5), kept(probs, order[:5])) < 2
    total, nucleus = 0.0, []
    for token in order:
        if total >= 0.7:
            break
        nucleus.append(token)
        total += float(probs[token])
    assert chi_square(counts(LOGITS, top_p=0.7), kept(probs, nucleus)) < 2
    floor = 0.2 * float(probs.max())
    assert chi_square(counts(LOGITS, min_p=0.2), kept(probs, [t for t in order if float(probs[t]) >= floor])) < 2


def test_temperature_zero_takes_the_likeliest_whatever_else_is_asked() -> None:
    assert sample(LOGITS[None], [row(temperature=0.0, top_k=3, top_p=0.1)])[0].token == int(LOGITS.argmax())


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0, 3])), min_size=1, max_size=6),
    st.sampled_from([1.0, 0.9]),
    st.integers(0, 2**32),
)
def test_a_seed_gives_the_same_tokens_whatever_else_is_in_the_batch(others: list[tuple[float, int]], top_p: float, seed: int) -> None:
    alone, among = row(seed, top_p=top_p), row(seed, top_p=top_p)
    crowd = [row(i, temperature=t, top_k=k) for i, (t, k) in enumerate(others)]
    for _ in range(4):
        here = sample(LOGITS[None], [alone])[0].token
        there = sample(LOGITS.expand(len(crowd) + 1, -1), [*crowd, among])[-1].token
        assert here == there


def test_bias_bans_and_forces() -> None:
    assert sample(LOGITS[None], [row(temperature=0.0, logit_bias={7: 100.0})])[0].token == 7
    best = int(LOGITS.argmax())
    assert sample(LOGITS[None], [row(temperature=0.0, logit_bias={best: -100.0})])[0].token != best


def test_no_stop_token_before_min_tokens() -> None:
    best = int(LOGITS.argmax())
    r = row(temperature=0.0, min_tokens=2, stop_ids=(best,))
    for expected_stop in (False, False, True):
        token = sample(LOGITS[None], [r])[0].token
        assert (token == best) is expected_stop
        r.count(token)


def test_penalties_are_openais_and_repetition_covers_the_prompt() -> None:
    r = row(temperature=1.0, presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=1.3)
    r.prompt = (2,)
    for token in (4, 4, 9):
        r.count(token)
    expected = LOGITS.clone()
    for token in (2, 4, 9):
        expected[token] = expected[token] / 1.3 if expected[token] > 0 else expected[token] * 1.3
    expected[4] -= 0.5 + 0.5
    expected[9] -= 0.5 + 0.25
    from pdlab.real.engine.sampler import _alter

    altered = LOGITS.clone()
    _alter(altered, r)
    torch.testing.assert_close(altered, expected)


def test_log_probabilities_are_the_models_own() -> None:
    expected = LOGITS.log_softmax(-1)
    first, second = sample(LOGITS.expand(2, -1), [row(temperature=0.0, logprobs=3, logit_bias={5: 50.0}), row(temperature=0.0)])
    assert first.token == 5
    assert first.logprob == pytest.approx(float(expected[5]), abs=1e-5)
    assert first.top is not None
    assert [t for t, _ in first.top] == expected.argsort(descending=True)[:3].tolist()
    assert second.logprob is None


def test_an_empty_batch_samples_nothing() -> None:
    assert sample(torch.empty(0, 24), []) == []


@given(st.lists(st.integers(0, 23), min_size=1, max_size=6, unique=True), st.floats(0.0, 2.0), st.integers(0, 4))
def test_only_what_is_allowed_is_drawn(allowed: list[int], temperature: float, seed: int) -> None:
    rows = [row(seed + i, allowed_token_ids=tuple(allowed), temperature=temperature) for i in range(8)]
    assert {s.token for s in sample(LOGITS.expand(8, -1), rows)} <= set(allowed)
    if temperature == 0.0:
        assert sample(LOGITS[None], rows[:1])[0].token == max(allowed, key=lambda i: float(LOGITS[i]))


def test_draws_among_what_is_allowed_follow_their_softmax() -> None:
    allowed = (3, 5, 7, 11)
    assert chi_square(counts(LOGITS, allowed_token_ids=allowed), kept(LOGITS.softmax(-1), list(allowed))) < 2


def test_a_bad_word_is_not_finished() -> None:
    best = [int(i) for i in LOGITS.argsort(descending=True)]
    one = row(temperature=0.0, bad_words={"single": ((best[0],),), "pair": ((best[1], best[2]), (best[1], best[1]))})
    assert sample(LOGITS[None], [one])[0].token == best[1]
    one.count(best[1])
    assert sample(LOGITS[None], [one])[0].token == best[3]  # neither the single one, nor a second of the pairs
    one.count(best[3])
    assert sample(LOGITS[None], [one])[0].token == best[1]


def test_where_bans_leave_nothing_what_is_allowed_stays() -> None:
    best = int(LOGITS.argmax())
    other = (best + 1) % 24
    for bans in ({"bad_words": {"w": ((other,),)}}, {"min_tokens": 4}):
        one = row(stop_ids=(other,), temperature=0.7, allowed_token_ids=(other,), **bans)
        assert sample(LOGITS[None], [one])[0].token == other


def test_scores_are_the_softmax_of_each_row() -> None:
    logits = torch.randn(5, 24, generator=torch.Generator().manual_seed(4))
    targets = [int(logits[0].argmax()), 3, 4, 5, int(logits[4].argmin())]
    found = score(logits, targets, 2)
    for row_of, target, one in zip(logits.log_softmax(-1), targets, found, strict=True):
        assert one.logprob == pytest.approx(float(row_of[target]))
        assert one.rank == 1 + int((row_of > row_of[target]).sum())
        assert [token for token, _ in one.top] == row_of.topk(2).indices.tolist()
    assert (found[0].rank, found[4].rank) == (1, 24)
    assert score(logits[:0], [], 3) == []
    assert all(one.top == [] for one in score(logits, targets, 0))
