from __future__ import annotations

import numpy as np
import pytest

from pdlab.core.types import UsageError
from pdlab.proof.bench.prompts import Prompts, PromptTokens
from pdlab.workload.base import Workload


def workload(prompts: list[int], hashes: list[tuple[int, ...]] | None, hash_tokens: int = 4) -> Workload:
    count = len(prompts)
    ones = np.ones(count, np.int32)
    return Workload("made", np.zeros(count), np.array(prompts, np.int32), 8 * ones, hashes, hash_tokens)


def test_prompts_share_tokens_exactly_as_far_as_their_chains_agree() -> None:
    prompts = Prompts(workload([10, 12, 12], [(5, 6, 7), (5, 6, 8), (1 << 70, 6, 8)]), 1, PromptTokens())
    a, b, c = (prompts.tokens(i) for i in range(3))
    assert [len(p) for p in (a, b, c)] == [10, 12, 12]
    assert a[:8] == b[:8] and a[8:] != b[8:10]
    assert c[:4] != b[:4] and c[4:] == b[4:]


def test_prompts_without_names_share_nothing_and_come_again_from_an_equal_seed() -> None:
    made = workload([200, 200], None)
    one, again, other = (Prompts(made, seed, PromptTokens()) for seed in (1, 1, 2))
    assert one.tokens(0) == again.tokens(0) != other.tokens(0)
    assert len(set(one.tokens(0)) & set(one.tokens(1))) < 10


def test_ids_stay_within_the_vocabulary() -> None:
    low_high = PromptTokens.of(300)
    tokens = Prompts(workload([5000], None), 0, low_high).tokens(0)
    assert low_high.low <= min(tokens) < low_high.low + 20 and 280 < max(tokens) < 300
    assert PromptTokens.of(128_000) == PromptTokens()
    with pytest.raises(UsageError, match="--vocab 3"):
        PromptTokens.of(3)


def test_a_later_turn_repeats_what_the_server_answered() -> None:
    prompts = Prompts(workload([6, 16], [(1, 2, 3), (1, 2, 3, 4)]), 0, PromptTokens())
    first = prompts.tokens(0)
    answer = [11, 12, 13, 14, 15, 16, 17]
    prompts.answered(0, first, answer)
    assert prompts.tokens(1)[:12] == [*first, *answer][:12]


def test_a_unit_that_was_sent_keeps_its_tokens() -> None:
    prompts = Prompts(workload([6, 16], [(1, 2, 3), (1, 2, 3, 4)]), 0, PromptTokens())
    first, later = prompts.tokens(0), prompts.tokens(1)
    assert later[:6] == first
    prompts.answered(0, first, [11] * 8)
    assert prompts.tokens(1) == later
