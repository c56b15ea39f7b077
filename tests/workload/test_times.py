"""Times are told apart by what they look like, and kept to the last digit."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdlab.workload.times import PER_S, Clock, named_unit


def since_first(clock: Clock, times: list[str | int | float]) -> list[float]:
    seconds = [clock(time) for time in times]
    return [second - seconds[0] for second in seconds]


@pytest.mark.parametrize(
    ("times", "second_s", "said"),
    [
        (["2024-05-10 00:00:00.009930+08:00", "2024-05-10 00:00:01+08:00"], 0.99007, "ISO 8601, with"),
        (["2024-05-10T00:00:00+08", "2024-05-09T16:00:01.25Z"], 1.25, "ISO 8601, with"),
        (["2024-05-10T00:00:00Z", "2024-05-09 19:00:02-0500"], 2.0, "ISO 8601, with"),
        (["2024-05-10 00:00:00 UTC", "2024-05-10 05:30:00.5+05:30"], 0.5, "ISO 8601, with"),
        (["2024-05-10 00:00:00 +0000 UTC", "2024-05-10 00:00:01 +0000 UTC"], 1.0, "ISO 8601, with"),
        (["20240510T000000Z", "20240510T000001,5Z"], 1.5, "ISO 8601, with"),
        (["2024-05-10 00:00", "2024-05-10 00:00:01.5"], 1.5, "ISO 8601, without"),
        (["2024/05/10 00:00:00", "2024/05/10 00:00:01.5"], 1.5, "ISO 8601, without"),
        (["2024-05-10", "2024-05-11"], 86400.0, "ISO 8601, without"),
        (["2024-02-28T23:59:59.123456789", "2024-03-01T00:00:00"], 86400.876543211, "ISO 8601, without"),
        (["2016-12-31 23:59:60.5", "2017-01-01 00:00:00.5"], 0.0, "ISO 8601, without"),
        ([1700000000, 1700000001.5], 1.5, "epoch s"),
        (["1700000000123", "1700000001123"], 1.0, "epoch ms"),
        ([1700000000123456, 1700000000123457], 1e-6, "epoch us"),
        ([1700000000123456789, 1700000000123456790], 1e-9, "epoch ns"),
        (["0", "1500"], 1500.0, "relative s"),
        (["0.25", "1e3"], 999.75, "relative s"),
    ],
    ids=str,
)
def test_kinds_of_times(times: list[str | int | float], second_s: float, said: str) -> None:
    clock = Clock()
    assert since_first(clock, times)[1] == pytest.approx(second_s, abs=1e-10)
    assert clock.said.startswith(said)


def test_the_units_of_numbers_can_be_said() -> None:
    assert since_first(Clock("ms"), ["0", "1500"]) == [0.0, 1.5]
    assert since_first(Clock(relative="ms"), [0, 1500]) == [0.0, 1.5]
    assert since_first(Clock("ms"), ["1700000000", "1700000500"]) == [0.0, 0.5]
    assert since_first(Clock(relative="ms"), [1700000000123456, 1700000000123457]) == pytest.approx([0.0, 1e-6])


@pytest.mark.parametrize(
    ("times", "wanted"),
    [
        (["yesterday"], "a time such as"),
        (["nan"], "a time such as"),
        ([""], "a time such as"),
        (["1_0"], "a time such as"),
        (["2024-13-10 00:01"], "a time such as"),
        (["2024-05-10 00:61"], "a time such as"),
        (["11/16/2023 18:15:46"], "a time such as"),
        (["1", "2024-05-10 00:00:01"], "a number"),
        (["1700000000", "1700000001000"], "a time in s since 1970, as those above are"),
        (["1700000000000", "x"], "a time in ms since 1970, as those above are"),
        (["2024-05-10 00:00:01", "5"], "as those above are"),
        (["2024-05-10 00:00:01", "2024-05-10 00:00:nan"], "as those above are"),
        (["2024-05-10 00:00:01", "2024-05-10 00:00:-1"], "as those above are"),
        (["2024-05-10 00:00:01", "2024-05-10 00:00 7"], "as those above are"),
        (["2024-05-10 00:00:01", "2024-05-10 00:00:99"], "as those above are"),
        (["2024-05-10 00:00:00Z", "2024-05-10 00:00:01"], "46.68Z, as those above are"),
        (["2024-05-10 00:00:00", "2024-05-10 00:00:01Z"], "as those above are"),
    ],
    ids=str,
)
def test_what_is_no_time_or_not_of_the_first_ones_kind(times: list[str], wanted: str) -> None:
    clock = Clock()
    for time in times[:-1]:
        clock(time)
    with pytest.raises(ValueError):  # noqa: PT011  # the caller says which cell
        clock(times[-1])
    assert wanted in clock.wanted


ZONES = st.integers(-14 * 4, 14 * 4).map(lambda quarters: timezone(timedelta(minutes=15 * quarters)))
DATES = st.datetimes(datetime(1999, 1, 1), datetime(2099, 1, 1))


@given(st.lists(st.tuples(DATES, ZONES, st.sampled_from("T ")), min_size=2, max_size=6))
def test_dates_of_any_offset_are_as_far_apart_as_datetime_says(dates: list[tuple[datetime, timezone, str]]) -> None:
    moments = [date.replace(tzinfo=zone) for date, zone, _ in dates]
    texts = [moment.isoformat(sep) for moment, (_, _, sep) in zip(moments, dates, strict=True)]
    apart_s = [(moment - moments[0]).total_seconds() for moment in moments]
    assert since_first(Clock(), [*texts]) == pytest.approx(apart_s, abs=1e-5)


@given(st.sampled_from(list(PER_S)), st.floats(1e9, 4e9), st.integers(0, 10**6))
def test_a_number_since_1970_tells_its_unit(unit: str, start_s: float, apart: int) -> None:
    start = int(start_s * PER_S[unit])  # type: ignore[index]
    clock = Clock()
    assert since_first(clock, [start, start + apart])[1] == pytest.approx(apart / PER_S[unit])  # type: ignore[index]
    assert clock.said == f"epoch {unit}"


@pytest.mark.parametrize(
    ("name", "unit"),
    [("timestamp_ms", "ms"), ("timestampMs", "ms"), ("Arrival Time [ms]", "ms"), ("arrival (s)", "s"), ("request_start_ns", "ns")]
    + [(name, None) for name in ("ts", "timestamp", "tokens", "status", "hours", "arrival")],
)
def test_a_columns_name_may_end_in_its_unit(name: str, unit: str | None) -> None:
    assert named_unit(name)[1] == unit


def test_utc_is_what_times_are_counted_in() -> None:
    clock = Clock()
    clock("2024-05-10T12:00:00Z")
    assert clock(datetime(2024, 5, 10, 12, 1, tzinfo=UTC).isoformat()) == 60.0
