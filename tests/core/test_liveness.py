"""When an instance is held dead, sans-IO."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdlab.core.liveness import PROBES, Inquiry, Verdict

LEASE_S = 3.0


@pytest.mark.parametrize(("answer", "verdict"), [(True, Verdict.LIVES), (False, Verdict.DEAD)])
@pytest.mark.parametrize("silent_s", [0.0, 100.0])
def test_an_answer_is_believed_whatever_the_lease_says(answer: bool, verdict: Verdict, silent_s: float) -> None:
    assert Inquiry(LEASE_S).probed(answer, silent_s) is verdict


def test_a_fresh_lease_outranks_a_slow_probe() -> None:
    assert Inquiry(LEASE_S).probed(None, 2.9) is Verdict.LIVES


def test_without_a_fresh_lease_it_is_asked_again_with_more_patience() -> None:
    inquiry, patience = Inquiry(LEASE_S), [1.0]
    while inquiry.probed(None, 10.0) is Verdict.UNKNOWN:
        patience.append(inquiry.within_s)
    assert patience == [1.0, 2.0, 4.0]


@given(st.lists(st.tuples(st.sampled_from([True, False, None]), st.floats(0, 10)), min_size=PROBES, max_size=PROBES))
def test_every_inquiry_ends_and_nobody_is_dead_who_was_heard_in_time(probes: list[tuple[bool | None, float]]) -> None:
    inquiry = Inquiry(LEASE_S)
    for answer, silent_s in probes:
        verdict = inquiry.probed(answer, silent_s)
        if verdict is Verdict.DEAD:
            assert answer is False or silent_s >= LEASE_S
        if verdict is not Verdict.UNKNOWN:
            return
    raise AssertionError("no verdict")
