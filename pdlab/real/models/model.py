"""The decoder: embeddings, layers of attention over paged KV and a feed-forward, gated or of routed experts, and the head.

Tokens of all sequences lie flat in one row, as the kernels want them: a step of a mixed batch is one pass over each weight.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pdlab.kernels.decode import DecodeStep
from pdlab.kernels.fused import rms_norm
from pdlab.kernels.linear import NarrowWeight
from pdlab.real.models.attention import AttentionPass, Rotary, SoftmaxPass, in_halves
from pdlab.real.models.config import ModelConfig
from pdlab.real.models.experts import ExpertLoader
from pdlab.real.models.feed_forward import FeedForwardPass, GatedPass
from pdlab.real.models.inputs import Inputs, in_chunks
from pdlab.real.models.latent import LatentLoader
from pdlab.real.models.linear import Linear, Make, dense, packed
from pdlab.real.models.ranks import Embedding, Ranks, SummedLinear, SummedPass, filled
from pdlab.real.models.rope import tables
from pdlab.real.models.weights import shapes

ALONE = Ranks()


@dataclass(slots=True)
class DecoderLayer:
    """`after_attention`, `after_feed_forward`: norms of what each half adds, where a model has them (Gemma)."""

    input_norm: Tensor
    attention: AttentionPass
    out: Linear
    post_norm: Tensor
    feed_forward: FeedForwardPass
    after_attention: Tensor | None = None
    after_feed_forward: Tensor | None = None


class DecoderModel:
    """`weights` are taken by their Hugging Face names, in any order; q, k, v and gate, up are joined, so that each layer reads its
    weights in four products. `make` turns a weight into a Linear (quantised, if asked). With `ranks`, weights are this rank's parts, and
    `share` is the model as it computes it."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Iterable[tuple[str, Tensor | NarrowWeight]],
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
        cos, sin = tables(config.rope, config.rotated_dims, max_positions, rope_factors)
        self.cos, self.sin = cos.to(device), sin.to(device)
        local = None if config.rope_local is None else tables(config.rope_local, config.rotated_dims, max_positions)
        rotary = Rotary(self.cos, self.sin)
        windowed = rotary if local is None else Rotary(local[0].to(device), local[1].to(device))
        loader = _WeightLoader(config, device, dtype, make, ranks, rotary, windowed)
        for name, tensor in weights:
            loader.take(name, tensor)
        each = ranks.vocabulary(config)
        embedding = loader.plain["model.embed_tokens.weight"]
        self.embedding = Embedding(embedding, ranks, each)
        self.norm = loader.plain["model.norm.weight"]
        self.layers = [loader.layer(i) for i in range(config.layers)]
        head = filled(embedding if config.tied else loader.plain["lm_head.weight"], each)
        self.head = make(head, None) if make is packed else dense(head, None)  # never quantised: its errors would be the logits'

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
        eps = self.config.norm_eps
        if self.config.chunked is not None:
            inputs = in_chunks(inputs, max(self.config.windows), caches[0][0].shape[2])
        hidden = self._embedded(inputs.tokens)
        residual = hidden.clone()
        x = rms_norm(hidden, self.layers[0].input_norm, eps)
        for index, layer in enumerate(self.layers):
            if index:
                x = rms_norm(x, layer.input_norm, eps, residual)
            attended = layer.attention(x, inputs, caches[index], None if after_layer is None else partial(after_layer, index))
            if index == len(self.layers) - 1 and len(inputs.last) < len(inputs.tokens):  # of the rest nobody asks for more than KV
                attended, residual = attended.index_select(0, inputs.last), residual.index_select(0, inputs.last)
                if not len(attended):
                    self.ranks.barrier(self.device)  # nobody's KV is unwritten when rank 0's pass is over
                    return residual
            x = rms_norm(self._normed(layer.out(attended), layer.after_attention), layer.post_norm, eps, residual)
            x = self._normed(layer.feed_forward(x), layer.after_feed_forward)
        normed: Tensor = rms_norm(x, self.norm, eps, residual)
        return normed

    def _normed(self, x: Tensor, norm: Tensor | None) -> Tensor:
        return x if norm is None else rms_norm(x, norm, self.config.norm_eps)

    def _embedded(self, tokens: Tensor) -> Tensor:
        rows = self.embedding(tokens)
        return rows if self.config.embedding_scale == 1.0 else rows * torch.tensor(self.config.embedding_scale, dtype=self.dtype)

    @torch.inference_mode()
    def decode(self, inputs: Inputs, step: DecodeStep) -> Tensor:
        """As `forward`, where the next token of each of a few is wanted, with all layers in one call."""
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
        logits: Tensor = self.logits(rms_norm(x, self.norm, self.config.norm_eps, residual))
        return logits


class _WeightLoader:
    """Collects tensors by name; parts of a joined matrix go straight to their rows."""

    def __init__(
        self,
        config: ModelConfig,
        device: torch.device,
        dtype: torch.dtype,
        make: Make,
        ranks: Ranks,
        rotary: Rotary,
        windowed: Rotary,
    ) -> None:
        self.config, self.device, self.dtype, self.make, self.ranks = config, device, dtype, make, ranks
        self.rotary, self.windowed = rotary, windowed
        self.plain: dict[str, Tensor] = {}
        self.linears: dict[str, Linear] = {}
        self.joined: dict[str, Tensor] = {}
        self.missing: dict[str, int] = {}
        self.shapes = shapes(config)
        c = self.share = ranks.share(config)
        self.experts = (
            None
            if c.moe is None
            else ExpertLoader(
                c.moe,
                config.family,
                device,
                dtype,
                make,
                ranks.most,
                ranks.experts(c.moe),
                ranks.expert_rank * c.moe.width,
            )
        )
        self.latent = None if c.latent is None else LatentLoader(c, device, dtype, make, rotary)
        q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
        self.parts = {  # of a joined matrix: (its name, first row, rows in all)
            "self_attn.q_proj": ("qkv", 0, q + 2 * kv),
            "self_attn.k_proj": ("qkv", q, q + 2 * kv),
            "self_attn.v_proj": ("qkv", q + kv, q + 2 * kv),
            "mlp.gate_proj": ("gate_up", 0, 2 * c.ffn),
            "mlp.up_proj": ("gate_up", c.ffn, 2 * c.ffn),
        }

    def take(self, name: str, tensor: Tensor | NarrowWeight) -> None:
        if self.experts is not None and self.experts.take(name, tensor):
            return
        assert isinstance(tensor, Tensor), "routed experts alone may be narrow"
        name = name.replace(".feed_forward.", ".mlp.")  # of layers without experts
        if self.config.norm_shift and name.endswith("norm.weight"):
            tensor = tensor.float() + self.config.norm_shift
        if self.latent is not None and self.latent.take(name, tensor):
            return
        if self.config.interleaved and re.search(r"self_attn\.[qk]_proj\.(weight|bias)$", name):
            tensor = in_halves(tensor, self.config.head_dim, self.config.head_dim)
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
        return GatedPass(self.linears[f"{index}.gate_up"], self.linears[f"model.layers.{index}.mlp.down_proj"], self.config.activation)

    def layer(self, index: int) -> DecoderLayer:
        at, c = f"model.layers.{index}", self.config
        before, after = ("pre_feedforward_layernorm", "post_attention_layernorm") if c.sandwich else ("post_attention_layernorm", "")
        return DecoderLayer(
            input_norm=self.plain[f"{at}.input_layernorm.weight"],
            attention=self._softmax(index) if self.latent is None else self.latent.layer(index),
            out=self.linears[f"{at}.self_attn.o_proj"],
            post_norm=self.plain[f"{at}.{before}.weight"],
            feed_forward=self._feed_forward(index),
            after_attention=self.plain.get(f"{at}.{after}.weight"),
            after_feed_forward=self.plain.get(f"{at}.post_feedforward_layernorm.weight"),
        )

    def _softmax(self, index: int) -> SoftmaxPass:
        at, c = f"model.layers.{index}.self_attn", self.share
        sinks, chunked = self.plain.get(f"{at}.sinks"), c.chunked
        if chunked is not None:
            ropeless = chunked.ropeless[index]
            unit = torch.ones(c.head_dim, device=self.device, dtype=self.dtype) if chunked.unit_norm and not ropeless else None
            return SoftmaxPass(
                qkv=self.linears[f"{index}.qkv"],
                heads=c.heads,
                kv_heads=c.kv_heads,
                head_dim=c.head_dim,
                scale=c.scale,
                eps=c.norm_eps,
                rotary=None if ropeless else self.rotary,
                q_norm=unit,
                k_norm=unit,
                window=0,
                in_chunks=c.windows[index] > 0,
                temper=chunked.temper if ropeless else None,
            )
        return SoftmaxPass(
            qkv=self.linears[f"{index}.qkv"],
            heads=c.heads,
            kv_heads=c.kv_heads,
            head_dim=c.head_dim,
            scale=c.scale,
            eps=c.norm_eps,
            rotary=self.windowed if c.windows[index] else self.rotary,
            q_norm=self.plain.get(f"{at}.q_norm.weight"),
            k_norm=self.plain.get(f"{at}.k_norm.weight"),
            window=c.windows[index],
            sinks=None if sinks is None else sinks.float(),
        )
