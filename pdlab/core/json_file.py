"""JSON files that a user names: what is wrong with one is said in a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from pdlab.core.file_kinds import FileKind, in_place_of, kind_of_file
from pdlab.core.types import UsageError

Part = TypeVar("Part", bound=BaseModel)


def json_object(path: Path, what: str) -> dict[str, Any]:
    """The object in a file that is called `what`. Raises UsageError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UsageError(f"{what} {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{what} {path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise UsageError(f"{what} {path} is not a JSON object")
    return found


def json_model(path: Path, model: type[Part], what: str, wanted: FileKind, *, unknown: str = "") -> Part:
    """The file as a `model`. `unknown` is said of a key that this has not. Raises UsageError naming the first wrong place, or what else the
    file is."""
    try:
        return model.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{what} {path}: {error.strerror or error}") from None
    except ValidationError as error:
        if instead := in_place_of(path, kind_of_file(path), wanted):
            raise UsageError(f"{what}: {instead}") from None
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        wrong = unknown if unknown and first["type"] == "extra_forbidden" else first["msg"].removeprefix("Value error, ")
        raise UsageError(f"{what} {path}: {where}: {wrong}") from None
