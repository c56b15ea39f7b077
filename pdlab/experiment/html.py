"""An experiment in a few lines, for notebooks."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape


def fragment(title: str, rows: Iterable[tuple[str, str]], folded: str) -> str:
    """A table, and a text folded away."""
    cells = "".join(
        f"<tr><th style='text-align:left'>{escape(key)}</th><td style='text-align:left'>{escape(value)}</td></tr>" for key, value in rows
    )
    return f"<b>{escape(title)}</b><table>{cells}</table><details><summary>YAML</summary><pre>{escape(folded)}</pre></details>"
