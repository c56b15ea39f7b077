"""What one step of a model takes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class ChunkedInputs:
    """The tokens of a step where each attends to those of its own chunk alone: a sequence's part in each chunk is a sequence of its own,
    whose block table begins with the chunk. Else as in Inputs."""

    block_tables: Tensor
    query_starts: Tensor
    context_lens: Tensor
    max_queries: int


@dataclass(frozen=True, slots=True)
class Inputs:
    """One step. T tokens of S sequences, flat, each sequence's together.

    tokens, positions, slots: int64 [T]; a slot is block * block_tokens + offset. block_tables: int32 [S, most blocks]. query_starts:
    int32 [S + 1]. context_lens: int32 [S], KV tokens with this step's. last: int64, the rows whose next token is wanted. max_queries: the
    most tokens of one sequence. chunked: the same for attention within chunks; None: a sequence has but one.
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    block_tables: Tensor
    query_starts: Tensor
    context_lens: Tensor
    last: Tensor
    max_queries: int
    chunked: ChunkedInputs | None = None


def in_chunks(inputs: Inputs, chunk: int, block_tokens: int) -> Inputs:
    """With `chunked`, where a sequence is longer than a chunk of so many tokens, a multiple of `block_tokens`."""
    starts, contexts = inputs.query_starts.tolist(), inputs.context_lens.tolist()
    if max(contexts) <= chunk:
        return inputs
    pieces = []  # (sequence, first block, tokens of the chunk so far, of these in this step)
    for i, context in enumerate(contexts):
        at = context - (starts[i + 1] - starts[i])
        while at < context:
            first = at // chunk * chunk
            end = min(first + chunk, context)
            pieces.append((i, first // block_tokens, end - first, end - at))
            at = end
    blocks = [-(-tokens // block_tokens) for _, _, tokens, _ in pieces]
    tables = inputs.block_tables.new_zeros((len(pieces), max(blocks)))
    for row, (i, first, _, _), count in zip(tables, pieces, blocks, strict=True):
        row[:count] = inputs.block_tables[i, first : first + count]
    queries = torch.tensor([0, *(new for _, _, _, new in pieces)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    lengths = torch.tensor([tokens for _, _, tokens, _ in pieces], dtype=torch.int32)
    device = inputs.tokens.device
    chunked = ChunkedInputs(tables, queries.to(device), lengths.to(device), max(new for _, _, _, new in pieces))
    return replace(inputs, chunked=chunked)
