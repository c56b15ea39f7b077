"""A vLLM server as an instance: what it is, from /v1/models and /metrics, and its load, from /metrics.

Names of metrics are those of vLLM 0.32 and, where they were others before, the older ones; a counter's may end in _total or not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from pdlab.real.cluster.connections import Connections
from pdlab.real.cluster.remote import ALIVE_S, Broken
from pdlab.real.tls import PLAIN, Tls
from pdlab.types import PULL, InstanceSpec, Report, Role, UsageError

RUNNING, WAITING = ("vllm:num_requests_running",), ("vllm:num_requests_waiting",)
KV_USAGE = ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc")  # 0 to 1
PREEMPTIONS = ("vllm:num_preemptions_total", "vllm:num_preemptions")
STEPS = ("vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds")
GEOMETRY = "vllm:cache_config_info"


class _Model(msgspec.Struct, frozen=True):
    id: str
    max_model_len: int | None = None


class _Models(msgspec.Struct, frozen=True):
    data: list[_Model]


_read_models = msgspec.json.Decoder(_Models).decode


class Metrics:
    """What /metrics said. Several engines behind one server (data parallel) count together."""

    def __init__(self, text: str) -> None:
        """Raises Broken where `text` is not Prometheus'."""
        self._found: dict[str, list[float]] = {}
        self.geometry: list[dict[str, str]] = []  # of each engine
        try:
            for family in text_string_to_metric_families(text):
                for sample in family.samples:
                    self._found.setdefault(sample.name, []).append(sample.value)
                    if sample.name == GEOMETRY:
                        self.geometry.append(sample.labels)
        except (ValueError, KeyError, IndexError) as error:
            raise Broken(f"/metrics cannot be read: {error}") from None

    def all(self, names: Sequence[str], suffix: str = "") -> list[float]:
        """The values under the first of these names that is there."""
        found = next((self._found[name + suffix] for name in names if name + suffix in self._found), [])
        return [value for value in found if math.isfinite(value)]

    def total(self, names: Sequence[str], suffix: str = "") -> float:
        return sum(self.all(names, suffix))

    def blocks(self) -> tuple[int, int]:
        """KV blocks in all, and tokens in one. Raises Broken where they are not given, as while the model loads."""
        try:
            return sum(int(one["num_gpu_blocks"]) for one in self.geometry), int(self.geometry[0]["block_size"])
        except (IndexError, KeyError, ValueError):
            raise Broken(f"/metrics does not tell num_gpu_blocks and block_size in {GEOMETRY}") from None


class Vllm:
    """One server; of its key-value geometry `probe` asks, of its load `report`. `close` when it is not needed any more. Raises UsageError
    where `url` or `api_key` cannot be used."""

    def __init__(self, url: str, api_key: str = "", tls: Tls = PLAIN) -> None:
        self.url = url
        self._connections = Connections(url, api_key=api_key, tls=tls)
        self._steps = (0.0, 0.0)  # seconds, tokens: the inter-token histogram when last seen
        self._decode_step_s = 0.0

    def close(self) -> None:
        self._connections.close()

    async def healthy(self) -> bool:
        """Does it answer, and say that its engine lives?"""
        try:
            status, _ = await self._connections.call(b"GET", b"/health", within_s=ALIVE_S)
        except Broken:
            return False
        return status == 200

    async def probe(self, name: str, role: Role, model: str = "") -> tuple[InstanceSpec, int]:
        """Its spec, and the longest prompt plus output (tokens; 0: not said). `model`: which of several it is to serve. Raises Broken where
        it does not answer as vLLM does, UsageError where it does not serve that model."""
        models = await self._models()
        chosen = next((one for one in models if model in ("", one.id)), None)
        if chosen is None:
            raise UsageError(f"{self.url} serves {', '.join(one.id for one in models) or 'no model'}, not {model!r}: name one of its own")
        metrics = await self._metrics()
        kv_blocks, block_tokens = metrics.blocks()
        spec = InstanceSpec(
            name=name,
            role=role,
            kv_blocks=kv_blocks,
            block_tokens=block_tokens,
            prefix_cache=metrics.geometry[0].get("enable_prefix_caching", "True") == "True",
            url=self.url,
            engine="vllm",
            model=chosen.id,
            capabilities=(PULL,),
            context_tokens=max(0, chosen.max_model_len or 0),
        )
        return spec, chosen.max_model_len or 0

    async def report(self, spec: InstanceSpec, now: float) -> Report:
        """Its load, as asked at `now`. What vLLM does not tell is 0. Raises Broken."""
        metrics = await self._metrics()
        usage = metrics.all(KV_USAGE)
        used = round(spec.kv_blocks * min(1.0, max(0.0, sum(usage) / len(usage)))) if usage else 0
        return Report(
            spec.name,
            spec.incarnation,
            now,
            waiting=int(metrics.total(WAITING)),
            running=int(metrics.total(RUNNING)),
            used_blocks=used,
            free_blocks=spec.kv_blocks - used,
            preempted=int(metrics.total(PREEMPTIONS)),
            decode_step_s=self._step_s(metrics),
        )

    def _step_s(self, metrics: Metrics) -> float:
        """Mean seconds between two tokens of a sequence since the last time, or the last that were known. A server that began anew counts
        from 0."""
        seconds, tokens = metrics.total(STEPS, "_sum"), metrics.total(STEPS, "_count")
        before_s, before = self._steps if tokens >= self._steps[1] else (0.0, 0.0)
        if tokens > before:
            self._decode_step_s = max(0.0, seconds - before_s) / (tokens - before)
        self._steps = seconds, tokens
        return self._decode_step_s

    async def _models(self) -> list[_Model]:
        raw = await self._get(b"/v1/models")
        try:
            return _read_models(raw).data
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise Broken(f"{self.url}/v1/models cannot be read") from None

    async def _metrics(self) -> Metrics:
        return Metrics((await self._get(b"/metrics")).decode(errors="replace"))

    async def _get(self, path: bytes) -> bytes:
        status, raw = await self._connections.call(b"GET", path)
        if status in (401, 403):
            raise UsageError(f"{self.url}{path.decode()} was refused ({status}): the API key is missing or wrong")
        if status != 200:
            raise Broken(f"{self.url}{path.decode()} answered {status}")
        return raw
