"""What a holder believes about its claim, sans-IO: a leader stops before its lease can have ended, an instance outlives a silent store."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pdlab.real.registry.tenure import VALID, Tenure

LEASE_S = 3.0
STEPS = st.lists(st.tuples(st.floats(0.0, 8.0), st.sampled_from(["granted", "unanswered", "refused"])), max_size=20)


def test_a_leader_that_cannot_renew_stops_before_others_can_hold_its_place() -> None:
    tenure = Tenure(LEASE_S, 10.0)
    tenure.ask(11.0)
    tenure.granted()
    tenure.ask(12.0)
    tenure.unanswered()
    assert tenure.alive(11.0 + VALID * LEASE_S - 0.001) and not tenure.alive(11.0 + VALID * LEASE_S)


def test_an_instance_takes_its_place_again_only_where_the_stores_silence_explains_that_its_lease_ran_out() -> None:
    silent = Tenure(LEASE_S, 0.0, patient=True)
    for now in (1.0, 2.0, 3.0, 4.0):
        assert not silent.ask(now) or now >= silent.deadline_s
        silent.unanswered()
    assert silent.alive(100.0) and not silent.confirmed(4.0) and silent.ask(5.0)

    answered = Tenure(LEASE_S, 0.0, patient=True)
    assert not answered.ask(2.9), "the store was not silent"

    slept = Tenure(LEASE_S, 0.0, patient=True)
    slept.ask(1.0)
    slept.unanswered()
    assert not slept.ask(9.0), "it was this process that slept"
    slept.unanswered()
    assert slept.ask(10.0), "and then the store was silent"


@given(STEPS, st.booleans())
def test_whatever_the_store_answers_the_holder_never_believes_too_much(steps: list[tuple[float, str]], patient: bool) -> None:
    tenure, now, renewed_s = Tenure(LEASE_S, 0.0, patient=patient), 0.0, 0.0
    silent, over, asked_s = False, False, 0.0
    for wait_s, answer in steps:
        now += wait_s
        assert tenure.confirmed(now) is (not over and now < renewed_s + VALID * LEASE_S)
        assert tenure.alive(now) is (not over if patient else tenure.confirmed(now))
        if not tenure.alive(now):
            return
        retakes = tenure.ask(now)
        assert not retakes or (patient and silent and now - asked_s <= LEASE_S and not tenure.confirmed(now))
        asked_s = now
        if answer == "granted":
            tenure.granted()
            renewed_s, silent = now, False
        elif answer == "unanswered":
            tenure.unanswered()
            silent = True
        else:
            tenure.refused()
            over = True
