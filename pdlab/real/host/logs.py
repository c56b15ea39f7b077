"""What `pdlab serve` says: lines for the operator on stdout, the program's own log on stderr, each with its time; as text or as JSON.

Both go through `logging`, and so does what the libraries below have to say. Processes started inside take it on by their environment.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

from pdlab.core.types import UsageError, nearest

LEVELS, FORMATS = ("debug", "info", "warning", "error"), ("text", "json")
LEVEL, FORMAT, INSTANCE = "PDLAB_LOG_LEVEL", "PDLAB_LOG_FORMAT", "PDLAB_LOG_INSTANCE"
OPERATOR = "pdlab.serve"  # the logger whose lines are for the operator
Say = Callable[[str], None]


class Text(logging.Formatter):
    """Time, level and logger; the operator's lines without these two."""

    def format(self, record: logging.LogRecord) -> str:
        head = "" if record.name == OPERATOR else f"{record.levelname} {record.name}: "
        return f"{stamp(record)} {head}{super().format(record)}"


class Json(logging.Formatter):
    """An object a line."""

    def __init__(self, instance: str = "") -> None:
        super().__init__()
        self.instance = instance

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": stamp(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "pid": record.process,
        }
        if self.instance:
            line["instance"] = self.instance
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def stamp(record: logging.LogRecord) -> str:
    """UTC, to the millisecond."""
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


@contextlib.contextmanager
def configured(level: str, form: str, *, instance: str = "") -> Iterator[Say]:
    """Logging as asked for, until the end; gives what says a line to the operator. Raises UsageError where `level` or `form` is not known.
    As JSON a UsageError becomes lines, too, and ends the process with 2."""
    for option, word, known in (("--log-level", level, LEVELS), ("--log-format", form, FORMATS)):
        if word not in known:
            raise UsageError(f"{option} {word!r} is not one of {', '.join(known)}{nearest(word, known)}")
    formatter = Json(instance) if form == "json" else Text()
    root, own, operator = logging.getLogger(), logging.getLogger("pdlab"), logging.getLogger(OPERATOR)
    below, spoken = logging.StreamHandler(sys.stderr), logging.StreamHandler(sys.stdout)
    environment = {LEVEL: level, FORMAT: form, INSTANCE: instance}
    before = (own.level, operator.propagate, {name: os.environ.get(name) for name in environment})
    for logger, handler in ((root, below), (operator, spoken)):
        handler.setFormatter(formatter)
        logger.addHandler(handler)
    own.setLevel(level.upper())
    operator.propagate = False
    os.environ.update(environment)
    try:
        yield lambda words: _lines(operator, words)
    except UsageError as error:
        if form != "json":
            raise
        for line in str(error).splitlines():
            own.error("%s", line)
        sys.exit(2)
    finally:
        root.removeHandler(below)
        operator.removeHandler(spoken)
        own.setLevel(before[0])
        operator.propagate = before[1]
        for name, value in before[2].items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@contextlib.contextmanager
def inherited() -> Iterator[None]:
    """In a process that a configured one has started: the same. Else logging stays as it is."""
    if LEVEL not in os.environ:
        yield
        return
    with configured(os.environ[LEVEL], os.environ.get(FORMAT, FORMATS[0]), instance=os.environ.get(INSTANCE, "")):
        yield


def tell(words: str) -> None:
    """A line for the operator that is no answer: on stderr, with its time where logging is configured."""
    operator = logging.getLogger(OPERATOR)
    if not operator.handlers:
        print(words, file=sys.stderr, flush=True)
    elif operator.isEnabledFor(logging.INFO):
        root = next(handler for handler in logging.getLogger().handlers if isinstance(handler.formatter, Text | Json))
        root.handle(operator.makeRecord(OPERATOR, logging.INFO, "", 0, words, (), None))


def _lines(operator: logging.Logger, words: str) -> None:
    for line in words.splitlines():
        operator.info("%s", line)
