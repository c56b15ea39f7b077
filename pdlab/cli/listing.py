"""Tables of what is known by name."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table


def plain(*columns: str, right: Sequence[int] = ()) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index in right else "left", no_wrap=index == 0)
    return table


def first_sentence(text: str) -> str:
    words = " ".join(text.split())
    head, stop, _ = words.partition(". ")
    return escape(head + ("." if stop else ""))
