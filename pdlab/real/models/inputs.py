"""What one step of a model takes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Inputs:
    """One step. T tokens of S sequences, flat, each sequence's together.

    tokens, positions, slots: int64 [T]; a slot is block * block_tokens + offset. block_tables: int32 [S, most blocks]. query_starts:
    int32 [S + 1]. context_lens: int32 [S], KV tokens with this step's. last: int64, the rows whose next token is wanted. max_queries: the
    most tokens of one sequence.
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    block_tables: Tensor
    query_starts: Tensor
    context_lens: Tensor
    last: Tensor
    max_queries: int
