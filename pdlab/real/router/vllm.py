"""A vLLM server as an instance: what it is, from /v1/models and /metrics, and its load, from /metrics.

Names of metrics are those of vLLM 0.32 and, where they were others before, the older ones; a counter's may end in _total or not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from pdlab.core.instance_spec import MeasuredInstance, Placed, instance_spec
from pdlab.core.types import PULL, UNKNOWN, InstanceSpec, Report, Role, StepTime, UsageError
from pdlab.cost import InstanceProfile, measured_profiles
from pdlab.real.net.http import Broken, HttpClient
from pdlab.real.net.tls import PLAIN, Tls
from pdlab.real.router.remote import ALIVE_S

RUNNING, WAITING = ("vllm:num_requests_running",), ("vllm:num_requests_waiting",)
KV_USAGE = ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc")  # 0 to 1
PREEMPTIONS = ("vllm:num_preemptions_total", "vllm:num_preemptions")
GAPS = ("vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds")
PREFILLS, PROMPTS = ("vllm:request_prefill_time_seconds",), ("vllm:request_prompt_tokens",)  # histograms over requests that have ended
QUERIES, HITS = ("vllm:prefix_cache_queries_total", "vllm:prefix_cache_queries"), ("vllm:prefix_cache_hits_total", "vllm:prefix_cache_hits")
RECEIVED = ("vllm:external_prefix_cache_hits_total", "vllm:external_prefix_cache_hits")  # prompt tokens whose KV came from elsewhere
FEWEST_TOKENS = 16  # of a prompt, that its seconds say something of
GEOMETRY = "vllm:cache_config_info"


class _Model(msgspec.Struct, frozen=True):
    id: str
    max_model_len: int | None = None


class _Models(msgspec.Struct, frozen=True):
    data: list[_Model]


_read_models = msgspec.json.Decoder(_Models).decode


class VllmMetrics:
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


@dataclass(frozen=True, slots=True)
class Sums:
    """What a server has counted of its steps since it began."""

    gaps: float = 0.0  # between two tokens of a sequence
    gaps_s: float = 0.0
    prefills: float = 0.0
    prefills_s: float = 0.0
    prompts: float = 0.0
    prompt_tokens: float = 0.0
    queries: float = 0.0  # prompt tokens looked up in the prefix cache
    hits: float = 0.0
    received: float = 0.0

    @classmethod
    def of(cls, metrics: VllmMetrics) -> Sums:
        return cls(
            *(metrics.total(names, suffix) for names in (GAPS, PREFILLS, PROMPTS) for suffix in ("_count", "_sum")),
            *(metrics.total(names) for names in (QUERIES, HITS, RECEIVED)),
        )

    def since(self, before: Sums) -> Sums:
        """What came after `before`; all, of a server that began anew."""
        anew = self.gaps < before.gaps or self.prefills < before.prefills or self.prompts < before.prompts
        return self if anew else Sums(*(a - b for a, b in zip(astuple(self), astuple(before), strict=True)))

    def steps(self, running: int, context_tokens: int) -> tuple[StepTime, ...]:
        """Its mean decode step, and its mean prompt, as far as they are told."""
        found = []
        if self.gaps > 0:
            found.append(StepTime(max(1, running), context_tokens, 0, 0, self.gaps_s / self.gaps))
        if self.prefills > 0 and self.prompts > 0:
            share = max(0.0, 1.0 - (self.hits + self.received) / self.queries) if self.queries > 0 else 1.0
            tokens = round(share * self.prompt_tokens / self.prompts)
            if tokens >= FEWEST_TOKENS:
                found.append(StepTime(0, 0, tokens, tokens * tokens, self.prefills_s / self.prefills))
        return tuple(step for step in found if step.seconds > 0.0)


class Vllm:
    """One server; of its key-value geometry `probe` asks, of its load `report`. `close` when it is not needed any more. `profile`: what was
    measured of its steps before. Raises UsageError where `url` or `api_key` cannot be used."""

    def __init__(self, url: str, api_key: str = "", tls: Tls = PLAIN, profile: InstanceProfile | None = None) -> None:
        self.url, self.profile = url, profile
        self._http = HttpClient(url, api_key=api_key, tls=tls)
        self._sums = Sums()

    def close(self) -> None:
        self._http.close()

    async def healthy(self) -> bool:
        """Does it answer, and say that its engine lives?"""
        try:
            status, _ = await self._http.call(b"GET", b"/health", within_s=ALIVE_S)
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
        placed = Placed(
            name=name,
            role=role,
            url=self.url,
            engine="vllm",
            model=chosen.id,
            prefix_cache=metrics.geometry[0].get("enable_prefix_caching", "True") == "True",
        )
        measured = MeasuredInstance(
            kv_blocks=kv_blocks,
            block_tokens=block_tokens,
            context_tokens=max(0, chosen.max_model_len or 0),
            capabilities=(PULL,),
            tells_cache=False,
        )
        if (profile := self.profile) is not None:
            limits = profile.engine
            prefill, decode = measured_profiles(profile, limits.max_batch_tokens, limits.max_seqs, kv_blocks * block_tokens)
            measured = replace(measured, prefill_profile=prefill, decode_profile=decode)
        spec = instance_spec(placed, measured)
        return spec, chosen.max_model_len or 0

    async def report(self, spec: InstanceSpec, now: float) -> Report:
        """Its load, as asked at `now`; what vLLM does not tell is UNKNOWN. Raises Broken."""
        metrics = await self._metrics()
        usage = metrics.all(KV_USAGE)
        used = round(spec.kv_blocks * min(1.0, max(0.0, sum(usage) / len(usage)))) if usage else UNKNOWN
        waiting, running = int(metrics.total(WAITING)), int(metrics.total(RUNNING))
        before, self._sums = self._sums, Sums.of(metrics)
        since = self._sums.since(before)
        return Report(
            spec.name,
            spec.incarnation,
            now,
            waiting=waiting,
            waiting_tokens=UNKNOWN,
            running=running,
            context_tokens=UNKNOWN,
            used_blocks=used,
            free_blocks=spec.kv_blocks - used if used != UNKNOWN else UNKNOWN,
            waiting_head_blocks=UNKNOWN if waiting else 0,
            waiting_blocks=UNKNOWN if waiting else 0,
            preempted=int(metrics.total(PREEMPTIONS)),
            decode_steps=int(self._sums.gaps),
            decode_s=self._sums.gaps_s,
            steps=since.steps(running, max(0, used) * spec.block_tokens),
        )

    async def _models(self) -> list[_Model]:
        raw = await self._get(b"/v1/models")
        try:
            return _read_models(raw).data
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise Broken(f"{self.url}/v1/models cannot be read") from None

    async def _metrics(self) -> VllmMetrics:
        return VllmMetrics((await self._get(b"/metrics")).decode(errors="replace"))

    async def _get(self, path: bytes) -> bytes:
        status, raw = await self._http.call(b"GET", path)
        if status in (401, 403):
            raise UsageError(f"{self.url}{path.decode()} was refused ({status}): the API key is missing or wrong")
        if status != 200:
            raise Broken(f"{self.url}{path.decode()} answered {status}")
        return raw
