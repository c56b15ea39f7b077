"""Bodies, read by their types. Unknown fields are ignored, as vLLM does; wrong ones are named, and so are those that are known elsewhere
and not had here (`refused`). A whole number may come as 3.0."""

from __future__ import annotations

import re
from typing import Any, TypeVar

import msgspec

from pdlab.real.api.errors import ApiError, bad
from pdlab.real.api.refused import RefusedFields

Body = TypeVar("Body", bound=msgspec.Struct)


def parse(raw: bytes, decoder: msgspec.json.Decoder[Body]) -> Body:
    """A body. Raises ApiError naming the field that is missing, of the wrong type, or refused."""
    try:
        try:
            body = decoder.decode(raw)
        except msgspec.ValidationError as error:
            if "got `float`" not in str(error):
                raise _wrong(error) from None
            body = _with_whole_numbers(msgspec.json.decode(raw), error, decoder)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise bad(f"the body is not valid JSON: {error}") from None
    if isinstance(body, RefusedFields):
        body.refusals.check(body)
    return body


def _with_whole_numbers(fields: Any, error: msgspec.ValidationError, decoder: msgspec.json.Decoder[Body]) -> Body:
    """The body once more, where what was wrong is 3.0 instead of 3. Raises ApiError for whatever else is wrong."""
    tried: set[str] = set()
    while True:
        name = _place(error)[1]
        if name is None or name in tried or "got `float`" not in str(error) or not re.search(r"Expected `int\b", str(error)):
            raise _wrong(error)
        tried.add(name)
        fields[name] = _whole_numbers(fields[name], name)
        try:
            return decoder.decode(msgspec.json.encode(fields))
        except msgspec.ValidationError as another:
            error = another


def _whole_numbers(value: Any, name: str) -> Any:
    """Of a field of integers, with what else may be in it."""
    if isinstance(value, dict):
        return {key: _whole_numbers(one, name) for key, one in value.items()}
    if isinstance(value, list):
        return [_whole_numbers(one, name) for one in value]
    if isinstance(value, float):
        if not value.is_integer():
            raise bad(f"{name} must be a whole number, not {value:g}", name)
        return int(value)
    return value


def _place(error: msgspec.ValidationError) -> tuple[str, str | None]:
    """(where it is in the body, the field of the body)."""
    path = str(error).partition(" - at `")[2].rstrip("`").removeprefix("$").removeprefix(".")
    return path, re.split(r"[.\[]", path)[0] or None


def _wrong(error: msgspec.ValidationError) -> ApiError:
    what = str(error).partition(" - at `")[0]
    path, param = _place(error)
    if missing := re.search(r"missing required field `(\w+)`", what):
        return bad(f"{path}.{missing[1]} is required".lstrip("."), param or missing[1])
    return bad(f"{path or 'the body'}: {what[:1].lower()}{what[1:]}", param)
