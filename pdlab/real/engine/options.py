"""How an engine is to be set up. The HTTP process makes it from the command line and the experiment; it knows no torch."""

from __future__ import annotations

import os
from typing import Literal

import msgspec


class SpeculationOptions(msgspec.Struct, frozen=True, kw_only=True):
    """`tokens` are drafted a step, by n-grams of the sequence itself, of `prompt_lookup_min` to `prompt_lookup_max` tokens, or by a smaller
    `model`."""

    method: Literal["ngram", "draft_model"]
    tokens: int
    model: str = ""
    prompt_lookup_min: int = 2
    prompt_lookup_max: int = 5


class EngineOptions(msgspec.Struct, frozen=True, kw_only=True):
    """`model` is a Hugging Face folder or a .gguf file. Zero or empty: the engine's own choice."""

    model: str
    device: str = "cpu"
    dtype: str = "auto"
    kv_cache_dtype: str = "auto"  # as dtype; fp8 (or fp8_e4m3), bfloat16, float16, float32
    quantization: str = ""  # wint8 or wint4: weight-only
    load_format: str = "auto"  # dummy: random weights, config.json alone suffices
    threads: int = 0  # of a CPU engine, of all its ranks here together
    tp: int = 1  # ranks that hold each layer together
    ep: int = 1  # groups of those that share a layer's experts out
    nnodes: int = 1  # hosts that they are spread over, evenly
    node_rank: int = 0  # which of them this is
    master: str = ""  # host:port where rank 0 meets those of other hosts
    max_model_len: int = 0
    kv_gib: float = 0.0
    kv_blocks: int = 0
    block_tokens: int = 16
    max_batch_tokens: int = 2048
    max_seqs: int = 256
    batching: str = "chunked"
    prefix_cache: bool = True
    watermark: float = 0.01
    hbm_utilization: float = 0.9
    eos_ids: tuple[int, ...] = ()
    seed: int = 0
    ttft_slo_s: float = 1.0  # of requests that bring none, for batchings that go by them
    tpot_slo_s: float = 0.05
    kv_name: str = ""  # as which peers know its KV memory; empty: it exchanges none
    kv_transport: str = "auto"
    kv_host: str = "127.0.0.1"
    kv_port: int = 0
    kv_advertise: str = ""
    kv_token: str = ""  # only peers with the same may connect
    kv_checksums: bool = False
    speculation: SpeculationOptions | None = None
    lease_s: float = 30.0  # of KV that waits for a decode instance
    self_profile: bool = False  # it measures itself before it is ready
    decisions: str = ""  # a file that takes the scheduler's decisions

    @property
    def random(self) -> bool:
        """Are its weights?"""
        return self.load_format == "dummy"

    @property
    def ranks_here(self) -> range:
        """The ranks on this host."""
        each = self.tp // self.nnodes
        return range(self.node_rank * each, (self.node_rank + 1) * each)

    def device_of_rank(self, rank: int) -> str:
        """Of one that is here: those of accelerators follow each other."""
        if self.tp == 1 or self.device == "cpu":
            return self.device
        kind, _, index = self.device.partition(":")
        return f"{kind}:{int(index or 0) + rank - self.ranks_here.start}" if (index or "0").isdigit() else self.device

    @property
    def rank_threads(self) -> int:
        """Of each rank's own process. Zero: as many as it likes."""
        if len(self.ranks_here) == 1:
            return self.threads
        return max(1, (self.threads or len(os.sched_getaffinity(0))) // len(self.ranks_here))


OPTIONS = msgspec.msgpack.Decoder(EngineOptions)
