"""The decoder: embeddings, layers of attention over paged KV and a feed-forward, gated or of routed experts, and the head.

Tokens of all sequences lie flat in one row, as the kernels want them: a step of a mixed batch is one pass over each weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pdlab.kernels.decode import DecodeStep
from pdlab.kernels.fused import rms_norm, rope
from pdlab.kernels.paged_attention import paged_attention, store_kv
from pdlab.real.models.config import ModelConfig
from pdlab.real.models.experts import ExpertLoader
from pdlab.real.models.feed_forward import FeedForwardPass, GatedPass
from pdlab.real.models.linear import Linear, Make, dense, packed
from pdlab.real.models.ranks import Embedding, Ranks, SummedLinear, SummedPass, filled
from pdlab.real.models.rope import tables
from pdlab.real.models.weights import shapes

ALONE = Ranks()


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


@dataclass(slots=True)
class DecoderLayer:
    input_norm: Tensor
    qkv: Linear
    out: Linear
    post_norm: Tensor
    feed_forward: FeedForwardPass
    q_norm: Tensor | None
    k_norm: Tensor | None
    window: int


class DecoderModel:
    """`weights` are taken by their Hugging Face names, in any order; q, k, v and gate, up are joined, so that each layer reads its
    weights in four products. `make` turns a weight into a Linear (quantised, if asked). With `ranks`, weights are this rank's parts, and
    `share` is the model as it computes it."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Iterable[tuple[str, Tensor]],
        *,
        device: torch.device,
        dtype: torch.dtype,
        max_positions: int,
        make: Make = dense,
        rope_factors: Tensor | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.config, self.ranks, self.share = config, ranks, ranks.share(config)
        self.device = device
        self.dtype = dtype
        loader = _WeightLoader(config, device, dtype, make, ranks)
        for name, tensor in weights:
            loader.take(name, tensor)
        each = ranks.vocabulary(config)
        embedding = loader.plain["model.embed_tokens.weight"]
        self.embedding = Embedding(embedding, ranks, each)
        self.norm = loader.plain["model.norm.weight"]
        self.layers = [loader.layer(i) for i in range(config.layers)]
        head = filled(embedding if config.tied else loader.plain["lm_head.weight"], each)
        self.head = make(head, None) if make is packed else dense(head, None)  # never quantised: its errors would be the logits'
        cos, sin = tables(config.rope, config.head_dim, max_positions, rope_factors)
        self.cos, self.sin = cos.to(device), sin.to(device)

    @torch.inference_mode()
    def forward(self, inputs: Inputs, caches: Sequence[tuple[Tensor, Tensor]], after_layer: Callable[[int], None] | None = None) -> Tensor:
        """Logits float32 [len(inputs.last), vocab], at rank 0. `caches` are each layer's keys and values, [blocks, kv_heads, block_tokens,
        head_dim], and take this step's; `after_layer(index)` is called when they have one's."""
        logits: Tensor = self.logits(self.hidden(inputs, caches, after_layer))
        return logits

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 [rows, vocab], of what `hidden` returns."""
        if not len(hidden):
            return torch.empty((0, self.config.vocab), device=self.device)
        return self.ranks.columns(self.head(hidden), self.config.vocab).float()

    @torch.inference_mode()
    def hidden(self, inputs: Inputs, caches: Sequence[tuple[Tensor, Tensor]], after_layer: Callable[[int], None] | None = None) -> Tensor:
        """As `forward`, but for the head: [len(inputs.last), hidden]. `inputs.last` ascends."""
        c, eps = self.share, self.config.norm_eps
        hidden = self.embedding(inputs.tokens)
        residual = hidden.clone()
        first_v, scale = c.heads + c.kv_heads, c.head_dim**-0.5
        x = rms_norm(hidden, self.layers[0].input_norm, eps)
        for index, layer in enumerate(self.layers):
            if index:
                x = rms_norm(x, layer.input_norm, eps, residual)
            k_cache, v_cache = caches[index]
            qkv = layer.qkv(x).view(-1, first_v + c.kv_heads, c.head_dim)
            q, k, v = qkv[:, : c.heads], qkv[:, c.heads : first_v], qkv[:, first_v:]
            if layer.q_norm is not None and layer.k_norm is not None:
                q = rms_norm(q.reshape(-1, c.head_dim), layer.q_norm, eps).view(q.shape)
                k = rms_norm(k.reshape(-1, c.head_dim), layer.k_norm, eps).view(k.shape)
            rope(q, k, inputs.positions, self.cos, self.sin)
            store_kv(k, v, k_cache, v_cache, inputs.slots)
            if after_layer is not None:
                after_layer(index)
            attended = paged_attention(
                q,
                k_cache,
                v_cache,
                inputs.block_tables,
                inputs.query_starts,
                inputs.context_lens,
                scale=scale,
                window=layer.window,
                max_queries=inputs.max_queries,
            ).flatten(1)
            if index == len(self.layers) - 1 and len(inputs.last) < len(inputs.tokens):  # of the rest nobody asks for more than KV
                attended, residual = attended.index_select(0, inputs.last), residual.index_select(0, inputs.last)
                if not len(attended):
                    self.ranks.barrier(self.device)  # nobody's KV is unwritten when rank 0's pass is over
                    return residual
            x = rms_norm(layer.out(attended), layer.post_norm, eps, residual)
            x = layer.feed_forward(x)
        normed: Tensor = rms_norm(x, self.norm, eps, residual)
        return normed

    @torch.inference_mode()
    def decode(self, inputs: Inputs, step: DecodeStep) -> Tensor:
        """As `forward`, for one token of each of a few sequences, with all layers in one call."""
        residual = self.embedding(inputs.tokens)
        x = step(
            residual,
            inputs.positions,
            inputs.slots,
            inputs.block_tables,
            inputs.query_starts,
            inputs.context_lens,
            self.cos,
            self.sin,
        )
        return self.head(rms_norm(x, self.norm, self.config.norm_eps, residual)).float()


class _WeightLoader:
    """Collects tensors by name; parts of a joined matrix go straight to their rows."""

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype, make: Make, ranks: Ranks) -> None:
        self.config, self.device, self.dtype, self.make, self.ranks = config, device, dtype, make, ranks
        self.plain: dict[str, Tensor] = {}
        self.linears: dict[str, Linear] = {}
        self.joined: dict[str, Tensor] = {}
        self.missing: dict[str, int] = {}
        self.shapes = shapes(config)
        c = ranks.share(config)
        self.experts = None if c.moe is None else ExpertLoader(c.moe, config.family, device, dtype, make, ranks.most)
        q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
        self.parts = {  # of a joined matrix: (its name, first row, rows in all)
            "self_attn.q_proj": ("qkv", 0, q + 2 * kv),
            "self_attn.k_proj": ("qkv", q, q + 2 * kv),
            "self_attn.v_proj": ("qkv", q + kv, q + 2 * kv),
            "mlp.gate_proj": ("gate_up", 0, 2 * c.ffn),
            "mlp.up_proj": ("gate_up", c.ffn, 2 * c.ffn),
        }

    def take(self, name: str, tensor: Tensor) -> None:
        if self.experts is not None and self.experts.take(name, tensor):
            return
        pieces = name.split(".")
        if len(pieces) == 6 and (part := self.parts.get(".".join(pieces[3:5]))):
            self._join(f"{pieces[2]}.{part[0]}", part, pieces[5], tensor)
        else:
            self.plain[name] = tensor.to(self.device, self.dtype)
            if name.endswith("_proj.weight"):
                self._finish(name.removesuffix(".weight"))
            elif name.endswith("_proj.bias"):
                self._finish(name.removesuffix(".bias"))

    def _join(self, key: str, part: tuple[str, int, int], kind: str, tensor: Tensor) -> None:
        whole = f"{key}.{kind}"
        if whole not in self.joined:
            self.joined[whole] = torch.empty((part[2], *tensor.shape[1:]), device=self.device, dtype=self.dtype)
            self.missing[whole] = part[2]
        self.joined[whole][part[1] : part[1] + len(tensor)] = tensor
        self.missing[whole] -= len(tensor)
        biased = self.config.qkv_bias if part[0] == "qkv" else self.config.mlp_bias
        names = [f"{key}.weight", f"{key}.bias"] if biased else [f"{key}.weight"]
        if all(self.missing.get(name) == 0 for name in names):
            self.linears[key] = self.make(self.joined.pop(names[0]), self.joined.pop(names[1]) if biased else None)

    def _finish(self, stem: str) -> None:
        biased = f"{stem}.bias" in self.shapes
        if f"{stem}.weight" in self.plain and (not biased or f"{stem}.bias" in self.plain):
            bias = self.plain.pop(f"{stem}.bias") if biased else None
            self.linears[stem] = self._summed(self.plain.pop(f"{stem}.weight"), bias)

    def _summed(self, weight: Tensor, bias: Tensor | None) -> Linear:
        if self.ranks.size == 1:
            return self.make(weight, bias)
        return SummedLinear(self.make(weight, None if self.ranks.rank else bias, self.ranks.most), self.ranks)

    def _feed_forward(self, index: int) -> FeedForwardPass:
        if self.experts is not None and self.config.has_experts(index):
            routed = self.experts.layer(index)
            return routed if self.ranks.size == 1 else SummedPass(routed, self.ranks)
        return GatedPass(self.linears[f"{index}.gate_up"], self.linears[f"model.layers.{index}.mlp.down_proj"])

    def layer(self, index: int) -> DecoderLayer:
        at = f"model.layers.{index}"
        return DecoderLayer(
            self.plain[f"{at}.input_layernorm.weight"],
            self.linears[f"{index}.qkv"],
            self.linears[f"{at}.self_attn.o_proj"],
            self.plain[f"{at}.post_attention_layernorm.weight"],
            self._feed_forward(index),
            self.plain.get(f"{at}.self_attn.q_norm.weight"),
            self.plain.get(f"{at}.self_attn.k_norm.weight"),
            self.config.windows[index],
        )
