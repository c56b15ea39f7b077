"""CUDA graphs for decode steps: one launch for a whole pass, where a CPU could not queue the kernels as fast as they run.

One graph for each of a few batch sizes, captured before the engine is ready; a batch runs in the smallest that holds it, the rows left over
writing to no slot and read by nobody.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pdlab.real.engine.runner import Runner
from pdlab.real.models.inputs import Inputs
from pdlab.real.models.model import DecoderModel

SIZES = (1, 2, 4, 8, *range(16, 257, 16))


@dataclass(slots=True)
class Captured:
    """A pass over `inputs`, which stay where they are: `replay` computes `logits` anew from what they hold."""

    replay: Callable[[], None]
    inputs: Inputs
    logits: Tensor


class GraphRunner(Runner):
    """A Runner on CUDA. `max_tokens` bounds a sequence, and so the width of the block tables; `max_seqs` the batches that graphs are made
    for. The rest is Runner's."""

    def __init__(self, model: DecoderModel, *, max_tokens: int, max_seqs: int, **named: Any) -> None:
        super().__init__(model, **named)
        self.width = -(-max_tokens // self.block_tokens)
        self.sizes = [size for size, before in zip(SIZES, (0, *SIZES), strict=False) if before < max_seqs]
        self.captured: dict[int, Captured] = {}
        self.pool: Any = None

    def warm_up(self) -> None:
        """Every graph is captured, the largest first: the others take of its memory."""
        super().warm_up()
        for size in reversed(self.sizes):
            if size not in self.captured:
                self.captured[size] = self._capture(size)

    def _compute(self, inputs: Inputs, after_layer: Callable[[int], None] | None = None) -> Tensor:
        """As Runner's; a batch of single tokens, all sampled from, goes through a graph."""
        count = len(inputs.tokens)
        if inputs.max_queries > 1 or len(inputs.last) < count or count > self.sizes[-1]:
            return super()._compute(inputs, after_layer)
        size = next(size for size in self.sizes if size >= count)
        if size not in self.captured:
            self.captured[size] = self._capture(size)
        captured = self.captured[size]
        self._fill(captured.inputs, inputs, count)
        captured.replay()
        return captured.logits[:count]

    def _fill(self, static: Inputs, given: Inputs, count: int) -> None:
        """The graph's inputs become those of this step; rows left over attend to one token of block 0, and write nothing."""
        for name in ("tokens", "positions", "slots", "context_lens"):
            getattr(static, name)[:count] = getattr(given, name)
        static.slots[count:] = -1
        static.context_lens[count:] = 1
        static.block_tables[:count, : given.block_tables.shape[1]] = given.block_tables

    def _capture(self, size: int) -> Captured:
        device = self.model.device
        inputs = Inputs(
            tokens=torch.zeros(size, dtype=torch.int64, device=device),
            positions=torch.zeros(size, dtype=torch.int64, device=device),
            slots=torch.full((size,), -1, dtype=torch.int64, device=device),
            block_tables=torch.zeros((size, self.width), dtype=torch.int32, device=device),
            query_starts=torch.arange(size + 1, dtype=torch.int32, device=device),
            context_lens=torch.ones(size, dtype=torch.int32, device=device),
            last=torch.arange(size, dtype=torch.int64, device=device),
            max_queries=1,
        )
        replay, logits = self._record(lambda: self.model.forward(inputs, self.caches))
        return Captured(replay, inputs, logits)

    def _record(self, forward: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """(what runs `forward` again, where its result then lies)."""
        device = self.model.device
        side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):  # kernels are compiled, and libraries take their workspaces, before capture
            for _ in range(2):
                forward()
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            logits = forward()
        self.pool = graph.pool()
        return graph.replay, logits
