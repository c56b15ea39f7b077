"""How an instance forms its next batch. One strategy a file; the file's name is its name in YAML.

A strategy with parameters is a dataclass: its fields are the parameters, `Annotated` with their bounds. Within pdlab it is one line of
text, `slide_batching(urgency=0.8)`, so that it can be compared, logged, and given on a command line.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import pkgutil
import typing
from collections.abc import Mapping
from functools import cache
from typing import Any

import msgspec

from pdlab.core.policy import Range
from pdlab.core.scheduler import Batching
from pdlab.core.types import UsageError, nearest

CHUNKED = ("chunked", "delayed", "online_first", "slide_batching")  # a step has at most `max_batch_tokens` of a prompt


@cache
def names() -> tuple[str, ...]:
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__)))


def chunks(batching: str) -> bool:
    """Has a step at most `max_batch_tokens` of a prompt?"""
    name, parameters = split(batching)
    return name in CHUNKED and not parameters.get("prompts_first")


def strategy(name: str) -> type[Batching]:
    """The class in `pdlab/batching/<name>.py` that is named like the file. Raises UsageError."""
    if name not in names():
        raise UsageError(f"engine.batching: {name!r} is not one of {', '.join(names())}{nearest(name, names())}")
    found: type[Batching] = getattr(importlib.import_module(f"pdlab.batching.{name}"), name.title().replace("_", ""))
    return found


def load(batching: str) -> Batching:
    """The strategy that the line asks for. Raises UsageError."""
    name, parameters = split(batching)
    return strategy(name)(**_checked(name, parameters))


def spelled(batching: str | Mapping[str, Any]) -> str:
    """As one line, from that line, or from a mapping of `name` and parameters as YAML has it. Raises UsageError."""
    name, given = split(batching) if isinstance(batching, str) else (str(batching.get("name", "")), dict(batching))
    given.pop("name", None)
    parameters = _checked(name, given)
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in sorted(parameters.items()))})" if parameters else name


def split(batching: str) -> tuple[str, dict[str, Any]]:
    """Its name, and its parameters as they stand there. Raises UsageError."""
    name, bracket, _ = batching.partition("(")
    if not bracket:
        return batching, {}
    try:
        call = ast.parse(batching, mode="eval").body
        assert isinstance(call, ast.Call) and not call.args
        return name, {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
    except (SyntaxError, ValueError, AssertionError, RecursionError, MemoryError):
        raise UsageError(f"engine.batching: {batching[:100]!r} is not like slide_batching(urgency=0.8)") from None


def _checked(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Raises UsageError where the strategy has no such parameter, or cannot have such a value."""
    cls: Any = strategy(name)
    hints: dict[str, Any] = {}
    if dataclasses.is_dataclass(cls):
        every = typing.get_type_hints(cls, include_extras=True)
        hints = {field.name: every[field.name] for field in dataclasses.fields(cls) if field.init}
    known, found = list(hints), {}
    for key, value in given.items():
        if key not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise UsageError(f"engine.batching: {name} has no parameter {str(key)[:50]!r}{nearest(str(key), known)}; {has}")
        try:
            found[key] = msgspec.convert(value, hints[key])
        except msgspec.ValidationError as error:
            raise UsageError(f"engine.batching: {name}: {key} is {value!r}: {error}") from None
        for bounds in typing.get_args(hints[key])[1:]:
            if isinstance(bounds, Range) and not bounds.hold(found[key]):
                raise UsageError(f"engine.batching: {name}: {key} must be {bounds}, not {value!r}")
    return found
