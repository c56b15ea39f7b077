"""One account of what happened to a request, whoever keeps it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pdlab.core.types import Report, Request, Stage
from pdlab.results.records import FIELDS
from pdlab.results.timeline import TIMES, Book, Timeline

REQUEST = Request(7, 10.0, 100, priority=2, ttft_slo_s=0.5, n=2, best_of=3)


def served(request: Request = REQUEST) -> Timeline:
    line = Timeline(request)
    line.dispatched(11.0, "p")
    line.prefill_started(12.0, 32)
    line.prefilled()
    line.first_token(13.0)
    line.handed_off(13.5, "d")
    line.transfer_began(14.0)
    line.transferred(15.0, 1000.0)
    line.decode_began(16.0)
    return line


def test_a_hand_off_that_did_not_come_about_leaves_no_times() -> None:
    line = Timeline(REQUEST)
    line.dispatched(1.0, "p")
    line.handed_off(2.0, "d")
    line.transfer_began(3.0)
    line.refused()
    assert line.decode_instance is None
    assert math.isnan(line.handoff_s)
    assert math.isnan(line.transfer_start_s)


def test_it_is_in_the_stage_that_what_happened_says() -> None:
    line = Timeline(REQUEST)
    stages = [line.stage]
    for step in (
        lambda: line.dispatched(1.0, "p"),
        lambda: line.prefill_started(1.0, 0),
        line.prefilled,
        lambda: line.handed_off(2.0, "d"),
        lambda: line.transferred(3.0, 1.0),
        lambda: line.decode_began(4.0),
        line.migrating,
        lambda: line.migrated("e"),
        lambda: line.decode_began(5.0),
        lambda: line.ended(Stage.DONE, 6.0),
    ):
        step()
        stages.append(line.stage)
    assert [stage.name for stage in stages] == [
        "QUEUED_P",
        "QUEUED_P",
        "PREFILL",
        "LEASED",
        "TRANSFER",
        "QUEUED_D",
        "DECODE",
        "MIGRATING",
        "MIGRATING",
        "DECODE",
        "DONE",
    ]
    assert (line.decode_start_s, line.decode_instance, line.migrations) == (4.0, "e", 1)


def test_another_attempt_forgets_all_but_what_the_client_has_and_what_was_spent() -> None:
    line = served()
    line.restarted()
    assert all(math.isnan(getattr(line, name)) for name in TIMES)
    assert (line.prefill_instance, line.decode_instance, line.cached_tokens, line.stage) == (None, None, 0, Stage.QUEUED_P)
    assert (line.first_token_s, line.attempts, line.transfer_bytes) == (13.0, 1, 1000.0)
    line.dispatched(20.0, "q")
    line.first_token(21.0)
    assert (line.first_token_s, line.attempts, line.prefill_instance) == (13.0, 2, "q"), "the client has it already"


def test_a_hand_off_that_is_refused_was_none() -> None:
    line = Timeline(REQUEST)
    line.dispatched(1.0, "p")
    line.prefill_started(1.0, 0)
    line.prefilled()
    line.handed_off(2.0, "d")
    line.refused()
    assert (line.stage, line.decode_instance) == (Stage.LEASED, None)
    assert math.isnan(line.handoff_s)
    line.handed_off(3.0, "p")
    assert (line.stage, line.decode_instance, line.handoff_s) == (Stage.LEASED, "p", 3.0), "where it is there is no transfer"


def test_a_row_has_every_field() -> None:
    book, line = Book(), served()
    book.place("p")
    line.received_tokens, line.preemptions = 30, 1
    line.ended(Stage.FAILED, 17.0, "no reason")
    book.write(line)
    row = dict(zip(FIELDS, book.records.rows, strict=True))
    expected = {
        "request_id": 7, "status": float(Stage.FAILED), "arrival_s": 10.0, "dispatched_s": 11.0, "prefill_start_s": 12.0,
        "first_token_s": 13.0, "handoff_s": 13.5, "transfer_start_s": 14.0, "transfer_end_s": 15.0, "decode_start_s": 16.0,
        "finish_s": 17.0, "prompt_tokens": 100,
        "cached_tokens": 32, "output_tokens": 30, "prefill_instance": 0, "decode_instance": 1, "transfer_bytes": 1000, "attempts": 1,
        "preemptions": 1, "migrations": 0, "priority": 2, "ttft_slo_s": 0.5, "n": 3, "reason": 0,
    }  # fmt: skip
    assert math.isnan(row.pop("tpot_slo_s"))
    assert row == expected
    assert book.records.instances == book.samples.instances == ["p", "d"] and book.records.reasons == ["no reason"]


def test_what_a_server_says_of_it_can_be_followed_on_another_clock() -> None:
    server = served()
    server.ended(Stage.DONE, 17.0)
    figures = server.figures()
    assert list(figures) == list(FIELDS)
    line = Timeline(Request(0, 2.0, 100))
    line.attempts, line.cached_tokens = 1, 5
    line.follow({**figures, "handoff_s": None, "preemptions": "many", "transfer_start_s": math.inf})
    assert [getattr(line, name) for name in ("dispatched_s", "prefill_start_s", "transfer_end_s", "decode_start_s")] == [3.0, 4.0, 7.0, 8.0]
    assert math.isnan(line.handoff_s) and math.isnan(line.transfer_start_s)
    assert (line.prefill_instance, line.decode_instance, line.cached_tokens, line.transfer_bytes, line.preemptions) == (
        "p",
        "d",
        32,
        1000.0,
        0,
    )
    assert math.isnan(line.first_token_s) and line.stage is Stage.QUEUED_P, "these are the client's own"


@pytest.mark.parametrize("of", ["requests", "reports"])
def test_of_more_rows_than_it_may_keep_the_older_half_goes(of: str) -> None:
    book = Book(most_rows=10)
    for number in range(25):
        if of == "requests":
            line = Timeline(Request(number, 0.0, 1))
            line.ended(Stage.DONE, 1.0)
            book.write(line)
        else:
            book.sample(float(number), Report("p", running=number), 100)
    kept = book.records.column("request_id") if of == "requests" else book.samples.column("t_s")
    np.testing.assert_array_equal(kept, np.arange(25 - len(kept), 25))
    assert 5 <= len(kept) <= 10
