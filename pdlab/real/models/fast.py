"""The decode step of few sequences in one call, where a CPU and its compiler allow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from pdlab.kernels.decode import DecodeStep, available
from pdlab.real.models.feed_forward import GatedPass
from pdlab.real.models.linear import FEW, Packed
from pdlab.real.models.model import DecoderModel, Inputs


@dataclass(frozen=True, slots=True)
class FastStep:
    """For up to `most` sequences: with more, weights as oneDNN orders them are quicker where there are such."""

    step: DecodeStep
    most: int

    @classmethod
    def of(cls, model: DecoderModel, caches: Sequence[tuple[Tensor, Tensor]]) -> FastStep | None:
        """None: where none serves, and for layers of routed experts, which this one call does not know."""
        c = model.config
        feeds = [layer.feed_forward for layer in model.layers if isinstance(layer.feed_forward, GatedPass)]
        if len(feeds) < len(model.layers):
            return None
        if model.ranks.size > 1 or model.device.type != "cpu" or not available(model.dtype):
            return None
        step = DecodeStep(
            heads=c.heads, kv_heads=c.kv_heads, head_dim=c.head_dim, hidden=c.hidden, ffn=c.ffn, eps=c.norm_eps, dtype=model.dtype
        )
        for layer, feed, cache in zip(model.layers, feeds, caches, strict=True):
            linears = [(linear.weight, linear.bias) for linear in (layer.qkv, layer.out, feed.gate_up, feed.down)]
            step.add_layer(linears, (layer.input_norm, layer.post_norm, layer.q_norm, layer.k_norm), cache, layer.window)
        return cls(step, 2 if isinstance(model.layers[0].qkv, Packed) else FEW)

    def takes(self, inputs: Inputs) -> bool:
        """Is this a decode step of few sequences?"""
        return inputs.max_queries == 1 and len(inputs.tokens) <= self.most and len(inputs.last) == len(inputs.tokens)
