"""How an engine is to be set up. The HTTP process makes it from the command line and the experiment; it knows no torch."""

from __future__ import annotations

import msgspec


class EngineOptions(msgspec.Struct, frozen=True, kw_only=True):
    """`model` is a Hugging Face folder or a .gguf file. Zero or empty: the engine's own choice."""

    model: str
    device: str = "cpu"
    dtype: str = "auto"
    quantization: str = ""  # wint8 or wint4: weight-only
    load_format: str = "auto"  # dummy: random weights, config.json alone suffices
    threads: int = 0  # of a CPU engine
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
    graphs: bool = True  # CUDA graphs for decode steps
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
    lease_s: float = 30.0  # of KV that waits for a decode instance
    self_profile: bool = False  # it measures itself before it is ready
    decisions: str = ""  # a file that takes the scheduler's decisions

    @property
    def random(self) -> bool:
        """Are its weights?"""
        return self.load_format == "dummy"


OPTIONS = msgspec.msgpack.Decoder(EngineOptions)
