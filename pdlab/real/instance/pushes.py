"""Prompts whose KV is written to the decode instance: when they are computed, chunk by chunk, or layer by layer while they are.

By layer, the layers of a chunk go in a few groups, since each push has its price; blocks that a chunk fills in part go with the next one. A
pass that is one call for all layers, and accelerators, whose layers are only under way when their turn has come, send by chunk. Of several
ranks each sends its own heads. When rank 0 has written a layer, it has added up the one before with all the others, who had written that
layer's KV by then: it says to all that those before may go.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from pdlab.core.sequence import Sequence
from pdlab.real.engine.engine import AfterLayer, Engine
from pdlab.real.engine.messages import Push, Submit, Tokens
from pdlab.real.host.background import Background
from pdlab.real.transfer.endpoint import KvEndpoint
from pdlab.real.transfer.result import TransferResult

GROUPS = 6  # of layers, in which a chunk is sent
Post = Callable[[Callable[[], None]], None]


@dataclass(slots=True, eq=False)
class Outbound:
    """A prompt on its way: its first `sent` tokens were sent off, those to `layers` of the next ones too."""

    id: int
    push: Push
    sent: int
    blocks: list[int] = field(default_factory=list)  # ours
    end: int = 0  # of the tokens in blocks that the pass under way completes
    layers: int = 0
    under_way: set[Future[None]] = field(default_factory=set)
    computed: bool = False
    stopping: bool = False
    failed: str = ""


class Pushes:
    """`over(id)` is called when all of a prompt is written, or cannot be."""

    def __init__(self, engine: Engine, endpoint: KvEndpoint, background: Background, post: Post, over: Callable[[int], None]) -> None:
        self.engine, self.endpoint, self.background, self.post, self.over = engine, endpoint, background, post, over
        self.live: dict[int, Outbound] = {}
        self.layers = self.engine.runner.model.config.layers
        self.stride = -(-self.layers // GROUPS)
        model = self.engine.runner.model
        self.by_layer = model.device.type == "cpu"
        self.behind = int(model.ranks.size > 1)  # layers that only rank 0 is known to have written
        self.active: list[Outbound] = []

    def __contains__(self, id: int) -> bool:
        return id in self.live

    def add(self, submit: Submit) -> None:
        assert submit.push is not None, "a push"
        self.live[submit.id] = Outbound(submit.id, submit.push, submit.push.cached_tokens)

    # ------------------------------------------------------------ the engine's pass

    def begins(self, chunks: list[tuple[Sequence, int]]) -> AfterLayer | None:
        block, self.active = self.engine.runner.block_tokens, []
        for seq, tokens in chunks:
            out = self.live.get(seq.request_id)
            if out is None or seq.owner.submit.push is not out.push:
                continue
            done = seq.computed + tokens
            out.end = done if done == seq.prompt_tokens else done - done % block
            out.blocks, out.layers = list(seq.owner.table), 0
            self.active.append(out)
        layered = [out for out in self.active if out.push.granularity == "layer" and out.end > out.sent]
        if not layered or not self.by_layer:
            return None

        def after(layer: int) -> None:
            written = layer + 1 - self.behind
            if written % self.stride == 0 and 0 < written < self.layers:
                for out in layered:
                    self._send(out, (out.layers, written))
                    out.layers = written

        return after

    def ends(self, chunks: list[tuple[Sequence, int]]) -> None:
        for out in self.active:
            if out.push.granularity != "request" and out.end > out.sent:
                self._send(out, (out.layers, self.layers))
                out.sent = out.end

    def finish(self, id: int) -> bool:
        """The prompt is computed; True where it is one of these."""
        out = self.live.get(id)
        if out is None:
            return False
        out.computed = True
        if out.end > out.sent:
            self._send(out, (0, self.layers))
            out.sent = out.end
        self._maybe_over(out)
        return True

    def stop(self, id: int) -> None:
        """Drop it: the request ends when nothing of it is on its way any more."""
        out = self.live[id]
        out.stopping = True
        for future in list(out.under_way):
            future.cancel()
        self._maybe_over(out)

    # ------------------------------------------------------------ the way

    def _send(self, out: Outbound, layers: tuple[int, int]) -> None:
        if out.failed or out.stopping:
            return
        push, source, tokens = out.push, out.blocks, range(out.sent, out.end)

        async def work() -> TransferResult:
            return await self.endpoint.push(
                push.descriptor, push.ticket, source, push.blocks, tokens=tokens, layers=layers, deadline_s=push.deadline_s
            )

        def done(result: TransferResult | BaseException) -> None:
            self.post(lambda: self._sent(out, future, result))

        future = self.background.start(work, done)
        out.under_way.add(future)

    def _sent(self, out: Outbound, future: Future[None], result: TransferResult | BaseException) -> None:
        out.under_way.discard(future)
        if not isinstance(result, TransferResult) or result.status != "done":
            out.failed = out.failed or (result.reason if isinstance(result, TransferResult) else f"{type(result).__name__}: {result}")
        self._maybe_over(out)

    def _maybe_over(self, out: Outbound) -> None:
        if out.under_way or not (out.computed or out.stopping):
            return
        if self.live.pop(out.id, None) is None:
            return
        if self.engine.holds(out.id):
            self.over(out.id)
        elif out.stopping:
            self.engine.cancel(out.id)

    def ended(self, outputs: list[Tokens]) -> None:
        """Requests that ended without being held: their token was their last."""
        for output in outputs:
            if output.finish not in (None, "held") and output.id in self.live:
                self.stop(output.id)
