"""Columns that fit together, and the ways to take a part of a workload."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pdlab.core.types import UsageError
from pdlab.workload.base import Workload
from pdlab.workload.chains import Chains


def made(arrival_s: list[float], **columns: Any) -> Workload:
    count = len(arrival_s)
    tokens = {"prompt_tokens": np.full(count, 40, np.int32), "output_tokens": np.full(count, 8, np.int32)}
    return Workload("test", np.array(arrival_s, float), **(tokens | columns))


def sessions() -> Workload:
    """Two sessions: rows 0, 1, 3 and rows 2, 4."""
    return made(
        [0.0, 5.0, 1.0, 7.0, 3.0],
        after=np.array([-1, 0, -1, 1, 2], np.int32),
        prompt_tokens=np.array([10, 20, 15, 30, 25], np.int32),
        hashes=Chains([(0,), (0, 1), (5,), (0, 1, 2), (5, 6)]),
    )


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"arrival_s": [1.0, 0.5]}, "arrival_s must ascend"),
        ({"arrival_s": [-1.0, 0.5]}, "arrival_s must ascend"),
        ({"arrival_s": [0.0, float("nan")]}, "arrival_s must ascend"),
        ({"arrival_s": [0.0, float("inf")]}, "arrival_s must ascend"),
        ({"arrival_s": []}, "has no requests"),
        ({"arrival_s": [0.0, 1.0], "output_tokens": np.array([1, 0], np.int32)}, "output_tokens of request 1 is 0"),
        ({"arrival_s": [0.0, 1.0], "priority": np.zeros(3, np.int16)}, "priority has 3 rows, arrival_s 2"),
        ({"arrival_s": [0.0, 1.0], "after": np.array([-1, 1], np.int32)}, "only come after an earlier one"),
        ({"arrival_s": [0.0, 1.0], "after": np.array([-1, 0], np.int32), "concurrency": 2}, "leave out after"),
    ],
)
def test_columns_that_make_no_workload(columns: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        made(**columns)


def test_only_full_units_of_the_prompt_count() -> None:
    workload = made([0.0], hashes=[(7, 8, 9)], prompt_tokens=np.array([47], np.int32))
    assert workload.prompt_hashes(0) == (7, 8)
    assert made([0.0]).prompt_hashes(0) == ()


def test_a_rate_is_of_all_requests_over_the_span_of_the_arrivals() -> None:
    assert made([0.0, 1.0, 4.0]).rate_rps == 0.5
    assert sessions().rate_rps == 4.0
    assert np.isnan(made([0.0, 0.0]).rate_rps)
    assert np.isnan(made([0.0, 1.0], concurrency=1).rate_rps)


def test_rescaling_stretches_every_gap_alike_and_no_think_time() -> None:
    assert made([0.0, 1.0, 4.0]).rescaled(1.0).arrival_s.tolist() == [0.0, 0.5, 2.0]
    assert made([3.0]).rescaled(1.0).arrival_s.tolist() == [3.0], "one request has no gap, and may be all that is asked for"
    assert sessions().rescaled(2.0).arrival_s.tolist() == [0.0, 5.0, 2.0, 7.0, 3.0]


@pytest.mark.parametrize("columns", [{"arrival_s": [3.0, 3.0]}, {"arrival_s": [0.0, 1.0], "concurrency": 4}])
def test_what_has_no_times_cannot_be_stretched(columns: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="has no times"):
        made(**columns).rescaled(2.0)


def test_head_takes_all_columns() -> None:
    head = sessions().head(3)
    assert (len(head), head.after.tolist(), list(head.hashes)) == (3, [-1, 0, -1], [(0,), (0, 1), (5,)])  # type: ignore[union-attr, arg-type]


def test_a_dropped_turn_takes_the_later_ones_along() -> None:
    workload = sessions()
    kept = workload.without(workload.prompt_tokens == 20, "because")
    assert kept.prompt_tokens.tolist() == [10, 15, 25]
    assert kept.after is not None
    assert kept.after.tolist() == [-1, -1, 1]
    assert list(kept.hashes or ()) == [(0,), (5,), (5, 6)]
    assert (kept.dropped, kept.notes) == (2, ("2 dropped: because",))


def test_parts_share_no_request_and_begin_at_0() -> None:
    whole = sessions()
    early, late = whole.part(0.0, 0.5), whole.part(0.5, 1.0)
    assert (early.prompt_tokens.tolist(), early.arrival_s.tolist()) == ([10, 20, 30], [0.0, 5.0, 7.0])
    assert (late.prompt_tokens.tolist(), late.arrival_s.tolist()) == ([15, 25], [0.0, 3.0])
    assert late.after is not None
    assert late.after.tolist() == [-1, 0]
    assert list(late.hashes or ()) == [(5,), (5, 6)]
    with pytest.raises(UsageError, match="its 2 requests are too few for a part between 10 % and 20 %"):
        whole.part(0.1, 0.2)


def test_until_ends_arrivals_not_sessions() -> None:
    kept = sessions().until(0.5)
    assert kept.prompt_tokens.tolist() == [10, 20, 30]
    assert (kept.dropped, kept.notes) == (0, ())


def test_turns_of_a_session_have_its_first_ones_number_and_what_is_said_counts_more() -> None:
    plain = {"arrival_s": np.array([0.0, 1.0, 2.0, 3.0]), "prompt_tokens": np.ones(4, np.int32), "output_tokens": np.ones(4, np.int32)}
    turns = Workload("turns", **plain, after=np.array([-1, 0, -1, 1], np.int32))
    assert turns.sessions() == [0, 0, 2, 0]
    assert [turns.labels(row, turns.sessions()) for row in (1, 2)] == [{"session": "0"}, {"session": "2"}]
    assert Workload("none", **plain).sessions() is None
    said = Workload(
        "said",
        **plain,
        after=np.array([-1, 0, -1, 1], np.int32),
        session=np.array([7, -1, 7, 8], np.int32),
        tenant=np.array([-1, 1, 1, 2], np.int32),
        offline=np.array([0, 1, 0, 0], np.int16),
    )
    labels = [said.labels(row, said.sessions()) for row in range(3)]
    assert labels == [{"session": "7"}, {"tenant": "1", "offline": True}, {"session": "7", "tenant": "1"}]
