"""`cluster` and `engine` in the experiment file: the instances, how each runs its batches, and what joins them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from pdlab.core.types import Role, UsageError
from pdlab.cost import catalogue
from pdlab.cost.accelerator import AcceleratorSpec
from pdlab.cost.parallel import Parallel
from pdlab.cost.roofline import Drafts
from pdlab.experiment.fields import (
    FORMAT,
    PROFILE,
    SERVE,
    SIM,
    Batching,
    Count,
    Device,
    Fraction,
    Hardware,
    KvCacheDtype,
    NotNegative,
    Number,
    Positive,
    Spec,
    Use,
)

MOST_INSTANCES = 10_000  # of one cluster: beyond, not even their arrival ends in a time that anybody waits


class SpeculationSpec(Spec):
    """Speculative decoding: `tokens` drafted a step, by the model's own layer for multi-token prediction (mtp), from the sequence's own
    text (ngram), or by a smaller `model`. Simulated, each is accepted with probability `acceptance` if those before it are."""

    method: Annotated[
        Literal["mtp", "ngram", "draft_model"],
        Use(serve="ngram and draft_model; mtp is refused"),
    ] = "mtp"
    tokens: Annotated[Count, Field(le=16)]
    acceptance: Annotated[NotNegative, Field(lt=1), SIM] = 0.6
    model: str | None = None
    prompt_lookup_min: Annotated[Count | None, SERVE] = None  # None: as the other; 5 where neither is there
    prompt_lookup_max: Annotated[Count | None, SERVE] = None

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.method == "draft_model" and not self.model:
            raise ValueError("method draft_model needs model: the folder or .gguf of a smaller model of the same vocabulary")
        if self.method != "draft_model" and self.model:
            raise ValueError(f"model is for method draft_model, not {self.method}")
        if self.method != "ngram" and (self.prompt_lookup_min or self.prompt_lookup_max):
            raise ValueError(f"prompt_lookup_min and prompt_lookup_max are for method ngram, not {self.method}")
        least, most = self.lookup
        if least > most:
            raise ValueError(f"prompt_lookup_min {least} exceeds prompt_lookup_max {most}")
        return self

    @property
    def lookup(self) -> tuple[int, int]:
        """Of how many tokens an n-gram is, at least and at most: vLLM's defaults."""
        least, most = self.prompt_lookup_min, self.prompt_lookup_max
        return least or most or 5, most or least or 5

    @property
    def assumption(self) -> str:
        """What a simulation takes to be so, in a line."""
        whose = self.model or {"mtp": "the model's own layer", "ngram": "n-grams"}[self.method]
        source = "as the file says" if "acceptance" in self.model_fields_set else "not measured: engine.speculation.acceptance"
        return f"{self.tokens} tokens drafted by {whose}: each right with probability {self.acceptance:g} if those before are ({source})"

    def drafts(self, served: catalogue.Model, base_dir: Path) -> Drafts:
        """As costed. Raises UsageError where the model that drafts is not known, or has another vocabulary."""
        if self.model is None:
            return Drafts(self.tokens, self.acceptance, layered=self.method == "mtp")
        try:
            drafter = catalogue.model(self.model, base_dir)
        except UsageError as error:
            raise UsageError(f"engine.speculation.model: {error}") from None
        if drafter.vocab != served.vocab:
            sizes = f"{drafter.vocab} tokens, and {served.name} one of {served.vocab}"
            raise UsageError(f"engine.speculation.model: {self.model} has a vocabulary of {sizes}")
        return Drafts(self.tokens, self.acceptance, layered=False, model=drafter)


class EngineSpec(Spec):
    """How an instance runs its batches."""

    like: Annotated[Literal["vllm", "sglang", "trtllm", "pdlab"], SIM] = "vllm"  # whose overheads and efficiencies it is costed with
    version: Annotated[str | None, Field(pattern=r"^v?\d+(\.\d+)*\S*$", max_length=40), SIM] = None  # of that engine
    speculation: SpeculationSpec | None = None

    block_tokens: Annotated[Count, Field(le=1 << 16)] = 16
    max_batch_tokens: Annotated[Count, Field(le=10_000_000)] = 8192
    max_seqs: Annotated[Count, Field(le=1 << 16)] = 256
    batching: Batching = "chunked"
    prefix_cache: bool = True
    watermark: Annotated[NotNegative, Field(lt=1)] = 0.01
    kv_cache_dtype: Annotated[KvCacheDtype, FORMAT] = "auto"  # auto: as `dtype`
    kv_blocks: Annotated[Count, Field(le=10**12)] | None = None  # None: what the memory holds beside the weights
    hybrid_kv: Annotated[bool, SIM] = True  # layers with a window keep a window's KV only
    hbm_utilization: Annotated[Fraction, Use(serve="yes, but on a CPU")] = 0.9
    max_model_len: Count | None = None  # tokens of prompt and output together; None: the model's positions


class InstancesSpec(Spec):
    """`count` like instances. Role `auto`: the first `prefill` of them prefill, the others decode."""

    role: Literal["prefill", "decode", "mixed", "auto"]
    count: Count = 1
    prefill: int | None = None
    hardware: Annotated[Hardware | None, PROFILE] = None
    tp: Count = 1
    dp_attention: Annotated[Count, Use(serve="1; more is refused")] = 1
    ep: Count = 1
    pp: Annotated[Count, Use(serve="1; more is refused")] = 1
    name: str | None = None
    device: Annotated[Device | None, SERVE] = None  # None: the deployment's
    host: Annotated[str | None, SIM] = None
    rack: str = ""
    zone: str = ""
    nics: Annotated[Count | None, SIM] = None  # None: one an accelerator
    engine: EngineSpec | None = None  # only the keys it gives differ from the experiment's

    @property
    def parallel(self) -> Parallel:
        """How an instance's accelerators share the model."""
        return Parallel(tp=self.tp, dp_attention=self.dp_attention, ep=self.ep, pp=self.pp)

    @model_validator(mode="after")
    def _divides(self) -> Self:
        try:
            _ = self.parallel
        except UsageError as error:
            raise ValueError(str(error)) from None
        return self

    @model_validator(mode="after")
    def _ratio(self) -> Self:
        if self.role != "auto":
            if self.prefill is not None:
                raise ValueError(f"prefill is for role auto: remove it, or write role: auto in place of {self.role}")
        elif self.prefill is None:
            raise ValueError(f"role auto needs prefill: how many of the {self.count} prefill")
        elif not 1 <= self.prefill < self.count:
            raise ValueError(f"prefill must be at least 1 and below count {self.count}, so that some decode, not {self.prefill}")
        return self

    def roles(self) -> list[Role]:
        """Each instance's role."""
        if self.role != "auto":
            return [Role(self.role)] * self.count
        prefill = self.prefill or 0
        return [Role.PREFILL] * prefill + [Role.DECODE] * (self.count - prefill)


class PathSpec(Spec):
    """A kind of path between two instances; what is None comes from the accelerator's data sheet."""

    gbytes_per_s: Positive | None = None
    latency_us: NotNegative = 10.0


class NetworkSpec(PathSpec):
    """Between hosts: of one NIC. `intra_host` is between instances of one host. `transport` says what is achieved of the line rate."""

    transport: Literal["ideal", "mooncake-roce", "mooncake-efa"] = "ideal"
    intra_host: PathSpec = PathSpec(latency_us=5.0)


class ReportsSpec(Spec):
    period_s: Annotated[Number, Field(ge=0.001)] = 0.5
    delay_s: Annotated[NotNegative, SIM] = 0.0


class AutoscaleSpec(Spec):
    """Whether a policy's Scale is carried out, and between how many instances in all."""

    enabled: bool = False
    min: Count = 2
    max: Annotated[Count, Field(le=MOST_INSTANCES)] = 16
    start_s: Annotated[NotNegative, SIM] = 30.0

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min {self.min} must not be above max {self.max}")
        return self


class ClusterSpec(Spec):
    instances: tuple[InstancesSpec, ...]
    network: Annotated[NetworkSpec, SIM] = NetworkSpec()
    reports: ReportsSpec = ReportsSpec()
    role_switch_s: Annotated[NotNegative, SIM] = 1.0
    detect_s: Annotated[NotNegative, SIM] = 0.5
    autoscale: AutoscaleSpec = AutoscaleSpec()

    @field_validator("instances")
    @classmethod
    def _bounded(cls, rows: tuple[InstancesSpec, ...]) -> tuple[InstancesSpec, ...]:
        if (count := sum(row.count for row in rows)) > MOST_INSTANCES:
            raise ValueError(f"{count:,} instances in all, and at most {MOST_INSTANCES:,} can be had: reduce their count")
        return rows


@dataclass(frozen=True, slots=True)
class Placement:
    """One instance of the cluster, as the file's rows add up to it. `hardware` and `device` are empty where the file names none."""

    name: str
    role: Role
    hardware: str | AcceleratorSpec
    parallel: Parallel
    host: str
    nics: int
    engine: EngineSpec
    device: str
    row: int  # of cluster.instances
    rack: str = ""
    zone: str = ""

    @property
    def accelerators(self) -> int:
        return self.parallel.gpus
