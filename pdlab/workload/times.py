"""Times as people write them, as seconds: dates of ISO 8601, numbers since 1970, numbers since a start of the file's own.

A column's first time says which of these it is; a number since 1970 says its unit by its size, for a second of 2001 is a millisecond of
1970. What has no year in it is taken in the unit that the column's name or the format says, or else in seconds.
"""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime
from typing import Literal

Unit = Literal["s", "ms", "us", "ns"]
PER_S: dict[Unit, float] = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}
_YEARS = 9e8, 4.2e9  # 1998 to 2103, in seconds since 1970
CENTURY_S = 3.2e9  # within which the epoch times of a file are, if their unit stays the same
_WORDS: dict[Unit, str] = {
    "s": "s sec secs second seconds",
    "ms": "ms msec millis milliseconds",
    "us": "us usec micros microseconds",
    "ns": "ns nsec nanos nanoseconds",
}
_UNIT_OF = {word: unit for unit, words in _WORDS.items() for word in words.split()}
_UNITS = "|".join(sorted(_UNIT_OF, key=len, reverse=True))
_NAMED_UNIT = re.compile(  # arrival_ms, Arrival (ms); arrivalMs; timestampms
    rf"(?i:(.+?)(?:[ _.\-]+|[ _.\-]*[(\[])({_UNITS})[)\]]?)"
    rf"|(.*[a-z])({'|'.join(word.capitalize() for word in _UNIT_OF)})"
    r"|(?i:(.*(?:time|stamp))([mun]s))"
)
_DATE = re.compile(
    r"\s*(\d{4})[-/]?(\d\d)[-/]?(\d\d)"
    r"(?:(?:[Tt]|\s+)(\d\d)(?::?(\d\d)(?::?(\d\d(?:[.,]\d*)?))?)?\s*(Z|z|UTC|GMT|[+-]\d\d(?::?\d\d)?)?(?:\s+UTC)?)?\s*"
)


class Clock:
    """Times of one column as seconds. `unit`: of its numbers, if file or user say so (`chosen`); `relative`: of numbers of no year's size.

    Seconds count from the first time's minute (dates) or from it itself (since 1970), so that no digit is lost.
    """

    def __init__(self, unit: Unit | None = None, relative: Unit = "s") -> None:
        self.unit: Unit | None = unit
        self.chosen = unit is not None
        self.said = "no times"
        self._relative: Unit = relative
        self._per_s = 0.0  # 0: the first time has not been seen
        self._origin: int | float = 0
        self._minutes: dict[str, float] = {}  # of dates: seconds from the origin, by all but the seconds
        self._zoned: bool | None = None
        self._zone_length = 0

    def __call__(self, time: str | int | float) -> float:
        """Raises ValueError where it is none, or not of the first one's kind."""
        if isinstance(time, str):
            if self._minutes:
                return self._since(time)
            try:
                number = _number(time)
            except ValueError:
                if self._per_s:
                    raise
                return self._since(time)
        else:
            number = time
        if self._minutes or isinstance(number, bool) or not math.isfinite(number):
            raise ValueError(time)
        if not self._per_s:
            self._begin(number)
        seconds = (number - self._origin) / self._per_s
        if self._origin and not -CENTURY_S < seconds < CENTURY_S:
            raise ValueError(time)
        return seconds

    def _begin(self, number: int | float) -> None:
        named = next((unit for unit, per_s in PER_S.items() if _YEARS[0] <= number / per_s < _YEARS[1]), None)
        unit = self.unit or named or self._relative
        since_1970 = named is not None and unit == named
        self.unit, self._per_s = unit, PER_S[unit]
        self._origin = number if since_1970 else 0
        self.said = f"{'epoch' if since_1970 else 'relative'} {unit}"

    def _since(self, text: str) -> float:
        """A date and time. What stands around the seconds is looked up: a year of rows has half a million minutes."""
        cut = len(text) - self._zone_length
        minute = self._minutes.get(text[:17] + text[cut:])
        if minute is not None:
            try:
                within_s = float(text[17:cut])
            except ValueError:
                pass
            else:
                if 0.0 <= within_s < 61.0:
                    return minute + within_s
        return self._parsed(text)

    def _parsed(self, text: str) -> float:
        parts = _DATE.fullmatch(text)
        if parts is None or self._per_s:
            raise ValueError(text)
        year, month, day, hours, minutes, seconds, zone = parts.groups()
        if self._zoned is not None and self._zoned is not (zone is not None):
            raise ValueError(text)
        within_s = float((seconds or "0").replace(",", "."))
        if not within_s < 61.0:  # a leap second is one
            raise ValueError(text)
        date = datetime(int(year), int(month), int(day), int(hours or 0), int(minutes or 0), tzinfo=UTC)
        since = date.timestamp() - _offset_s(zone)
        if not self._minutes:
            self._origin, self._zoned = since, zone is not None
            self.said = f"ISO 8601, {'with' if zone else 'without'} an offset from UTC"
        self._zone_length = len(zone or "")
        key = text[:17] + text[len(text) - self._zone_length :]
        if parts.start(6) == 17 and parts.end(6) == len(text) - self._zone_length:
            self._minutes[key] = since - self._origin
        else:
            self._minutes.setdefault("", 0.0)  # says that times are dates
        return since - self._origin + within_s

    @property
    def dates(self) -> bool:
        return bool(self._minutes)

    @property
    def wanted(self) -> str:
        """What the column's times have to be, for messages."""
        if self._minutes:
            return f"a time such as 2023-11-16 18:15:46.68{'Z' if self._zoned else ''}, as those above are"
        if self._origin:
            return f"a time in {self.unit} since 1970, as those above are"
        return "a number, as the times above are" if self._per_s else "a time such as 2023-11-16 18:15:46.68, 2023-11-16T18:15:46Z or 46.68"


class Seconds:
    """Times of pdlab's own format: numbers, in seconds, kept as they are."""

    unit: Unit | None = "s"
    said = "s"
    wanted = "a number"

    def __call__(self, time: str | int | float) -> float:
        """Raises ValueError where it is none."""
        if isinstance(time, str) or (isinstance(time, (int, float)) and not isinstance(time, bool)):
            return float(time)
        raise ValueError(time)


def _offset_s(zone: str | None) -> float:
    if zone is None or zone[0] not in "+-":
        return 0.0
    digits = zone[1:].replace(":", "")
    seconds = int(digits[:2]) * 3600 + int(digits[2:] or 0) * 60
    return -seconds if zone[0] == "-" else seconds


def _number(text: str) -> int | float:
    if "_" in text:
        raise ValueError(text)
    try:
        return int(text)
    except ValueError:
        return float(text)


def named_unit(name: str) -> tuple[str, Unit | None]:
    """A column's name without the unit at its end, and that: ("arrival", "ms") of `arrival_ms`; None where it says none."""
    parts = _NAMED_UNIT.fullmatch(name)
    if parts is None:
        return name, None
    base, word = (part for part in parts.groups() if part is not None)
    return base, _UNIT_OF[word.lower()]
