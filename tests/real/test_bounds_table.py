"""docs/guides/security.md tells every bound as it is."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "guides" / "security.md"
ROW = re.compile(r"^\| (?P<what>[^|]+) \| (?P<most>[\d,]+)[^|]* \| [^|]+ \| `(?P<constant>[\w.]+)` \|$", re.MULTILINE)
ROWS = [(row["what"], int(row["most"].replace(",", "")), row["constant"]) for row in ROW.finditer(PAGE.read_text(encoding="utf-8"))]


def test_the_table_is_there() -> None:
    assert len(ROWS) >= 22


@pytest.mark.parametrize(("what", "most", "constant"), ROWS, ids=[row[0] for row in ROWS])
def test_a_bound_is_what_the_page_says(what: str, most: int, constant: str) -> None:
    module, _, name = constant.rpartition(".")
    assert getattr(import_module(module), name) == most, what
