"""A step as rank 0 tells it to the other ranks of an instance."""

from __future__ import annotations

from collections.abc import Callable

import msgspec


class Pass(msgspec.Struct, frozen=True, tag=True):
    """The arrays of an Inputs as bytes, in its order, and its max_queries. `head_rows`: of what comes before the head, which rows go
    through it together; None: all."""

    arrays: list[bytes]
    max_queries: int
    head_rows: list[list[int]] | None = None


Tell = Callable[[Pass], None]
