"""From what pydantic found wrong to what a person can act on: a line for each mistake, saying where, what, and what was likely meant.

    cluster.instances.0.rol: unknown key; nearest is role
    transfer.mode: 'psh' is not one of push, pull; nearest is push

The dotted path is the one that `--set` takes.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pdlab.core.types import nearest
from pdlab.experiment import spellings

_WANTED = {
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be text",
    "path_type": "must be a path",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "dict_type": "must be a mapping",
    "mapping_type": "must be a mapping",
    "model_type": "must be a mapping",
    "dataclass_type": "must be a mapping",
}
_BOUNDS = {
    "greater_than": ("must be above", "gt"),
    "greater_than_equal": ("must be at least", "ge"),
    "less_than": ("must be below", "lt"),
    "less_than_equal": ("must be at most", "le"),
}


def mistakes(error: ValidationError, *models: type[BaseModel]) -> list[str]:
    """The lines, in the order of the file. Alternatives of a union that all failed share a line. A key of any of the models is known."""
    found: dict[str, list[str]] = {}
    for detail in error.errors(include_url=False):
        place, keys = _place(detail["loc"], models)
        for text in explained(detail, keys):
            texts = found.setdefault(place, [])
            if text not in texts:
                texts.append(text)
    lines: list[str] = []
    for place, texts in found.items():
        if not place:
            lines += texts  # mistakes of the whole name their places themselves
        elif not any(other.startswith(f"{place}.") for other in found):  # else one member of a union fits, but for what is inside
            lines.append(f"{place}: {_either(texts)}")
    return lines


def _either(texts: Sequence[str]) -> str:
    """must be text, not 3 + must be a mapping, not 3 = must be text or a mapping, not 3."""
    first, *others = texts
    for other in others:
        wanted, _, value = first.rpartition(", not ")
        if wanted.startswith("must be ") and other.startswith("must be ") and other.endswith(f", not {value}"):
            first = f"{wanted} or {other.removeprefix('must be ')}"
        else:
            first = f"{first} or {other}"
    return first


def explained(detail: ErrorDetails, keys: Sequence[str] = ()) -> list[str]:
    """One mistake, without its place. `keys` are those that are known there."""
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        key = str(detail["loc"][-1])
        if ours := spellings.key(key):
            return [f"unknown key; pdlab's is {ours}"]
        return [f"unknown key{nearest(key, keys) or _listed(keys)}"]
    if kind in ("missing", "missing_argument"):
        return ["is missing"]
    if kind in _WANTED:
        return [f"{_WANTED[kind]}, not {_shown(value)}"]
    if kind in _BOUNDS:
        words, key = _BOUNDS[kind]
        return [f"{words} {context[key]:g}, not {_shown(value)}"]
    if kind in ("literal_error", "enum"):
        allowed = str(context["expected"]).replace(" or ", ", ").replace("'", "")
        return [f"{_shown(value)} is not one of {allowed}{nearest(str(value), allowed.split(', '))}"]
    if kind == "value_error":
        return str(context["error"]).split("\n")
    if kind == "too_short":
        return [
            "must not be empty"
            if context["actual_length"] == 0
            else f"must have {context['min_length']} or more, not {context['actual_length']}"
        ]
    text = detail["msg"]
    return [f"{text[0].lower()}{text[1:]}, not {_shown(value)}"]


def _place(loc: Sequence[int | str], models: Sequence[type[BaseModel]]) -> tuple[str, list[str]]:
    """The dotted path of a mistake without pydantic's names for the members of a union, and the keys that are valid where it ends."""
    parts: list[str] = []
    here: list[Any] = list(models)
    keys: list[str] = []
    for position, part in enumerate(loc):
        known = {name: kind for cls in here for name, kind in _fields(cls).items()}
        if isinstance(part, int):
            parts.append(str(part))
        elif part in known:
            parts.append(part)
            keys = list(known)
            here = list(_classes(known[part]))
        elif position == len(loc) - 1 and known and not any(part == getattr(cls, "__name__", "") for cls in here):
            parts.append(part)
            keys = list(known)
        else:  # the name of a union's member, or a free mapping's key
            here = [cls for cls in here if getattr(cls, "__name__", "") == part] or here
    return ".".join(parts), keys


def _fields(cls: Any) -> dict[str, Any]:
    if isinstance(cls, type) and issubclass(cls, BaseModel):
        return {name: field.annotation for name, field in cls.model_fields.items()}
    if dataclasses.is_dataclass(cls):
        return dict(typing.get_type_hints(cls))
    return {}


def _classes(kind: Any) -> Iterable[Any]:
    """The classes that an annotation is made of: those of `tuple[Fault, ...] | None` are tuple's arguments and None."""
    if typing.get_origin(kind) is typing.Annotated:
        yield from _classes(typing.get_args(kind)[0])
    elif isinstance(kind, types.UnionType) or typing.get_origin(kind) is not None:
        for inner in typing.get_args(kind):
            yield from _classes(inner)
    else:
        yield kind


def _listed(keys: Sequence[str]) -> str:
    return f"; there are {', '.join(keys)}" if keys else ""


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
