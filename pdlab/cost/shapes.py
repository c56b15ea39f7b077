"""What a cost model needs to know of an accelerator and of a model: frozen facts and the arithmetic on them.

Vendors' "GB" of device memory are GiB in what the driver reports, so one is 2**30 bytes here; link and memory speeds are decimal.
Linear weights count; norms and biases (under 0.1 %), vision towers and multi-token prediction heads do not.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil
from typing import TYPE_CHECKING

from pdlab.cost.dtypes import EIGHT_BIT, dtype_bytes

if TYPE_CHECKING:
    from pdlab.cost.profile import InstanceProfile

GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """One accelerator. Peaks are dense, without sparsity; link speeds are for one direction of one accelerator; 0 where it has none."""

    name: str
    vendor: str
    family: str  # whose calibrated fractions it takes: a100, h100, ...
    bf16_flops: float  # 1/s
    fp8_flops: float  # 1/s, 0 without 8-bit units; int8 is taken to be as fast
    hbm_bytes: int
    hbm_bytes_per_s: float
    scaleup_bytes_per_s: float  # NVLink, HCCS, Infinity Fabric
    scaleup_domain: int  # accelerators that reach one another over it
    pcie_bytes_per_s: float
    nic_bytes_per_s: float  # as typically fitted
    tdp_w: float
    usd_per_h: float  # rough
    verified: bool
    source: str
    profile: InstanceProfile | None = field(default=None, repr=False)  # measured: its steps are timed, and not computed from the above

    def flops(self, dtype: str) -> float:
        """Peak operations a second for weights of this format: four-bit weights are widened to bf16 first, fp32 runs as TF32."""
        if dtype in EIGHT_BIT and self.fp8_flops:
            return self.fp8_flops
        return self.bf16_flops / 2 if dtype == "fp32" else self.bf16_flops

    def link_bytes_per_s(self, tp: int) -> float:
        """One direction of the link that `tp` ranks' collectives cross: scale-up inside its domain, PCIe in a host of 8, NIC beyond."""
        if tp <= self.scaleup_domain and self.scaleup_bytes_per_s:
            return self.scaleup_bytes_per_s
        return self.pcie_bytes_per_s if tp <= 8 else self.nic_bytes_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A decoder-only transformer's shape. Of `layers`, `dense_layers` have a dense feed-forward and the rest experts; without experts all
    are dense. With `kv_lora_rank`, attention is MLA, and `nope_dim`, `rope_dim`, `v_dim` are its head's parts."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    gated: bool = True  # three feed-forward matrices (SwiGLU), not two
    tied: bool = False  # the head shares the embedding's weights
    max_positions: int = 0
    learned_positions: int = 0  # rows of a learned position table
    experts: int = 0
    experts_per_token: int = 0
    expert_ffn: int = 0
    shared_ffn: int = 0  # of all shared experts together
    dense_layers: int = 0
    kv_lora_rank: int = 0
    q_lora_rank: int = 0
    nope_dim: int = 0
    rope_dim: int = 0
    v_dim: int = 0
    window_tokens: int = 0  # of its windowed layers; sparse attention's top-k is taken for a window
    window_layers: int = 0
    weight_dtype: str = "bf16"  # as published
    verified: bool = True
    source: str = ""

    @property
    def moe_layers(self) -> int:
        return self.layers - self.dense_layers if self.experts else 0

    @property
    def attention_params(self) -> int:
        """Of one layer."""
        if self.kv_lora_rank:
            query_dim = self.heads * (self.nope_dim + self.rope_dim)
            query = self.q_lora_rank * (self.hidden + query_dim) if self.q_lora_rank else self.hidden * query_dim
            compressed = self.hidden * (self.kv_lora_rank + self.rope_dim)
            expanded = self.kv_lora_rank * self.heads * (self.nope_dim + self.v_dim)
            return query + compressed + expanded + self.heads * self.v_dim * self.hidden
        return 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)

    @property
    def ffn_matrices(self) -> int:
        return 3 if self.gated else 2

    @property
    def expert_params(self) -> int:
        """Of one expert in one layer."""
        return self.ffn_matrices * self.hidden * self.expert_ffn

    @property
    def dense_params(self) -> int:
        """Read for every token, all layers: attention, dense feed-forwards, shared experts, routers; not the head."""
        dense_ffn = (self.layers - self.moe_layers) * self.ffn_matrices * self.hidden * self.ffn
        per_moe_layer = self.ffn_matrices * self.hidden * self.shared_ffn + self.hidden * self.experts
        return self.layers * self.attention_params + dense_ffn + self.moe_layers * per_moe_layer

    @property
    def head_params(self) -> int:
        return self.vocab * self.hidden

    @property
    def embedding_params(self) -> int:
        """Embedding and positions, and the head where it is not tied to them."""
        return self.head_params * (1 if self.tied else 2) + self.learned_positions * self.hidden

    @property
    def total_params(self) -> int:
        return self.dense_params + self.moe_layers * self.experts * self.expert_params + self.embedding_params

    @property
    def active_params(self) -> int:
        """Multiplied for one token, embeddings counted as in `total_params`."""
        return self.dense_params + self.moe_layers * self.experts_per_token * self.expert_params + self.embedding_params

    def weights_bytes(self, dtype: str = "bf16") -> int:
        """All weights, once. Quantised formats leave embedding and head in bf16, as published checkpoints do."""
        size = dtype_bytes(dtype)
        return int((self.total_params - self.embedding_params) * size + self.embedding_params * max(size, 2.0))

    def kv_bytes_per_token_per_rank(self, dtype: str = "bf16", tp: int = 1) -> int:
        """KV bytes that each of `tp` ranks keeps for one token: at least one KV head, all of MLA's compressed vector."""
        shared = self.kv_lora_rank + self.rope_dim
        values = shared if self.kv_lora_rank else 2 * self.head_dim * ceil(self.kv_heads / tp)
        return int(self.layers * values * dtype_bytes(dtype))

    def kv_bytes_per_token(self, dtype: str = "bf16", tp: int = 1) -> int:
        """KV bytes of one token over all `tp` ranks, replicas counted: what a transfer between two such instances moves."""
        return tp * self.kv_bytes_per_token_per_rank(dtype, tp)
