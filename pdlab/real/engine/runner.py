"""Runs one step on the device: lays the sequences' tokens out flat, runs the model, returns the logits that are wanted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pdlab.real.engine.messages import Scored
from pdlab.real.engine.passes import Pass, Tell
from pdlab.real.engine.sampler import score
from pdlab.real.host.huge_pages import keep_memory, use_huge_pages
from pdlab.real.models.fast import FastStep
from pdlab.real.models.inputs import Inputs
from pdlab.real.models.model import DecoderModel
from pdlab.real.transfer.shared import shared_kv

ROOM = 4  # times what a step's results take at once, since what else is kept lies between them
ROOM_TOKENS = 512  # a longer step makes its own room, once: what is touched here is time until an engine is ready
MOST_ROOM_BYTES = 256 << 20
MOST_LOGITS_BYTES = 64 << 20  # at once, where every token of a prompt has its own
Arrays = tuple[NDArray[Any], ...]  # an Inputs' tensors, in its order
DTYPES = (np.int64, np.int64, np.int64, np.int32, np.int32, np.int32, np.int64)  # theirs
TABLES, CONTEXTS = 3, 5


@dataclass(frozen=True, slots=True)
class Piece:
    """`tokens` of one sequence from position `start` on. `table` are the ids of its blocks, at least as far as these tokens reach.
    `samples`: of how many of the last of them the token after is wanted (True: of one). `targets` are the tokens that follow the first ones
    of these, where their log-probabilities are wanted, with those of the `alternatives` likeliest."""

    tokens: Sequence[int]
    start: int
    table: Sequence[int]
    samples: int
    targets: Sequence[int] = ()
    alternatives: int = 0


class Runner:
    """A model and its paged KV memory: `kv` [layers, planes, blocks, kv_heads, block_tokens, head_dim], planes being keys and values, or
    (MLA) the one that both are made of, of `kv_dtype` (None: the model's); `shared` with other processes of this host, where it is a CPU's.
    `step_tokens`: at most so many in a step, for whose results room is kept. `tell`: of rank 0, to tell the others of each pass, who run it
    by `follow`; `kv` has each rank's own heads."""

    def __init__(
        self,
        model: DecoderModel,
        *,
        kv_blocks: int,
        block_tokens: int,
        kv_dtype: torch.dtype | None = None,
        shared: bool = False,
        step_tokens: int = 0,
        tell: Tell | None = None,
    ) -> None:
        self.tell = tell
        c = model.config
        self.step_tokens = step_tokens
        self.model = model
        self.block_tokens = block_tokens
        shape = (c.layers, c.kv_planes, kv_blocks, model.share.kv_heads, block_tokens, c.head_dim)
        if shared and model.device.type == "cpu":
            self.kv = shared_kv(shape, kv_dtype or model.dtype)
        else:
            self.kv = torch.zeros(shape, dtype=kv_dtype or model.dtype, device=model.device)
        self.caches = [(layer[0], layer[-1]) for layer in self.kv]  # MLA's are one
        self.fast = FastStep.of(model, self.caches)

    def warm_up(self) -> None:
        """Run a pass of each kind, so that kernels are compiled, and memory is touched and well placed, before anybody waits. Block 0 is
        written to."""
        self.make_room()
        for tokens in (min(2 * self.block_tokens, self.block_tokens * self.kv.shape[2]), 1):
            self.run([Piece([0] * tokens, 0, list(range(-(-tokens // self.block_tokens))), True)])
        self.settle_memory()

    def make_room(self) -> None:
        """Keep memory for a step's results."""
        if self.kv.device.type == "cpu":
            keep_memory()
            c = self.model.share
            of_a_step = min(self.step_tokens, ROOM_TOKENS) * (3 * c.widest_feed_forward + 6 * c.hidden) * self.model.dtype.itemsize
            torch.ones(min(ROOM * of_a_step, MOST_ROOM_BYTES), dtype=torch.uint8)  # freed, and kept

    def settle_memory(self) -> None:
        """After the first passes: what they have touched lies well."""
        if self.kv.device.type == "cpu":
            use_huge_pages()

    def run(self, pieces: Sequence[Piece], after_layer: Callable[[int], None] | None = None) -> Tensor:
        """Logits float32 [what the pieces sample, vocab], in their order. `after_layer` is called when a layer's KV is written (of
        an accelerator: is under way), or never where all layers are one call."""
        return self._compute(self.inputs(pieces), after_layer)

    def _compute(self, inputs: Inputs, after_layer: Callable[[int], None] | None = None) -> Tensor:
        if self.fast is not None and self.fast.takes(inputs):
            return self.model.decode(inputs, self.fast.step)
        return self.model.forward(inputs, self.caches, after_layer)

    def score(self, pieces: Sequence[Piece], after_layer: Callable[[int], None] | None = None) -> tuple[Tensor, list[list[Scored]]]:
        """As `run`, with the log-probabilities of each piece's `targets`. A few rows at a time go through the head: all of a long chunk's
        logits would be gigabytes."""
        calls, sampled = self.head_rows(pieces)
        inputs = self.inputs(pieces, [*(list(range(first, end)) for _, _, first, end in calls), sampled])
        hidden = self.model.hidden(inputs, self.caches, after_layer)
        scores: list[list[Scored]] = [[] for _ in pieces]
        for of, start, first, end in calls:
            targets = pieces[of].targets[start : start + end - first]
            scores[of] += score(self.model.logits(hidden[first:end]), targets, pieces[of].alternatives)
        return self.model.logits(hidden[sampled]), scores

    def head_rows(self, pieces: Sequence[Piece]) -> tuple[list[tuple[int, int, int, int]], list[int]]:
        """Of what `hidden` returns for these: the rows that go through the head together for scores, as (piece, first target, first row,
        end), and then those that are sampled from."""
        rows = max(1, MOST_LOGITS_BYTES // (4 * self.model.config.vocab))
        calls, sampled, at = list[tuple[int, int, int, int]](), list[int](), 0
        for of, piece in enumerate(pieces):
            for start in range(0, len(piece.targets), rows):
                count = min(rows, len(piece.targets) - start)
                calls.append((of, start, at, at + count))
                at += count
            sampled += range(at, at + piece.samples)
            at += piece.samples
        return calls, sampled

    def follow(self, step: Pass, after_layer: Callable[[int], None] | None = None) -> None:
        """Another rank's part of a pass that rank 0 tells of."""
        arrays = tuple(np.frombuffer(bytearray(raw), dtype) for raw, dtype in zip(step.arrays, DTYPES, strict=True))
        tables = arrays[TABLES].reshape(len(arrays[CONTEXTS]), -1)
        inputs = self._on_device((*arrays[:TABLES], tables, *arrays[TABLES + 1 :]), step.max_queries)
        if step.head_rows is None:
            self._compute(inputs, after_layer)
            return
        hidden = self.model.hidden(inputs, self.caches, after_layer)
        for rows in step.head_rows:
            self.model.logits(hidden[rows])

    def inputs(self, pieces: Sequence[Piece], head_rows: list[list[int]] | None = None) -> Inputs:
        """The pieces as flat arrays on the device; and other ranks are told of them."""
        arrays, max_queries = self.arrays(pieces)
        if self.tell is not None:
            self.tell(Pass([array.tobytes() for array in arrays], max_queries, head_rows))
        return self._on_device(arrays, max_queries)

    def _on_device(self, arrays: Arrays, max_queries: int) -> Inputs:
        tokens, positions, slots, tables, starts, contexts, last = (
            torch.from_numpy(array).to(self.model.device, non_blocking=True) for array in arrays
        )
        return Inputs(tokens, positions, slots, tables, starts, contexts, last, max_queries)

    def arrays(self, pieces: Sequence[Piece]) -> tuple[Arrays, int]:
        """The arrays of an Inputs in its order, and its max_queries."""
        count = len(pieces)
        lengths = np.fromiter((len(p.tokens) for p in pieces), np.int64, count)
        starts = np.fromiter((p.start for p in pieces), np.int64, count)
        ends = lengths.cumsum()
        tokens = np.fromiter((t for p in pieces for t in p.tokens), np.int64, int(ends[-1]))
        of = np.repeat(np.arange(count), lengths)
        positions = np.arange(len(tokens)) - np.repeat(ends - lengths - starts, lengths)
        reach = -(-(starts + lengths) // self.block_tokens)
        tables = np.zeros((count, int(reach.max())), np.int32)
        for row, piece, blocks in zip(tables, pieces, reach.tolist(), strict=True):
            row[:blocks] = piece.table[:blocks]
        slots = tables[of, positions // self.block_tokens].astype(np.int64) * self.block_tokens + positions % self.block_tokens
        query_starts = np.zeros(count + 1, np.int32)
        query_starts[1:] = ends
        samples = np.fromiter((p.samples for p in pieces), np.int64, count)
        last = np.repeat(ends - samples.cumsum(), samples) + np.arange(samples.sum())
        if any(p.targets for p in pieces):
            first = (ends - lengths).tolist()
            last = np.sort(np.concatenate([last, *(np.arange(at, at + len(p.targets)) for at, p in zip(first, pieces, strict=True))]))

        return (tokens, positions, slots, tables, query_starts, (starts + lengths).astype(np.int32), last), int(lengths.max())
