"""The decode step of few sequences in one call, where a CPU and its compiler allow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from pdlab.kernels.decode import DecodeStep, available
from pdlab.real.models.attention import SoftmaxPass
from pdlab.real.models.feed_forward import GatedPass
from pdlab.real.models.inputs import Inputs
from pdlab.real.models.linear import FEW, Packed
from pdlab.real.models.model import DecoderModel


@dataclass(frozen=True, slots=True)
class FastStep:
    """For up to `most` tokens: with more, weights as oneDNN orders them are quicker where there are such."""

    step: DecodeStep
    most: int

    @classmethod
    def of(cls, model: DecoderModel, caches: Sequence[tuple[Tensor, Tensor]]) -> FastStep | None:
        """None: where none serves, for layers that are not as the Llama family's, which this one call does not know, and for ranks that
        share no memory."""
        c, shared = model.share, model.ranks.shared
        if not c.plain or model.device.type != "cpu" or not available(model.dtype) or (model.ranks.size > 1 and shared is None):
            return None
        step = DecodeStep(
            heads=c.heads,
            kv_heads=c.kv_heads,
            head_dim=c.head_dim,
            hidden=c.hidden,
            ffn=c.ffn,
            eps=c.norm_eps,
            dtype=model.dtype,
            sum=shared,
        )
        packs = False
        for layer, cache in zip(model.layers, caches, strict=True):
            attention, feed = layer.attention, layer.feed_forward
            assert isinstance(attention, SoftmaxPass) and isinstance(feed, GatedPass), "a plain model's"
            linears = [(linear.weight, linear.bias) for linear in (attention.qkv, layer.out, feed.gate_up, feed.down)]
            step.add_layer(linears, (layer.input_norm, layer.post_norm, attention.q_norm, attention.k_norm), cache, attention.window)
            packs = isinstance(attention.qkv, Packed)
        return cls(step, 2 if packs else FEW)

    def takes(self, inputs: Inputs) -> bool:
        """Is this a decode step of few sequences, with what they verify?"""
        return len(inputs.tokens) <= self.most and len(inputs.last) == len(inputs.tokens)
