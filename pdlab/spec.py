"""The experiment file: frozen models, one for each mapping of the YAML. docs/experiment-file.md explains every key to the user.

    experiment = Experiment.load("experiments/quickstart.yaml", ["workload.rate=12", "cluster.instances.0.count=3"])

A mistake in it is a `UsageError` with one line each: where, what, and the nearest valid key or value. Paths in a file (a trace, a policy,
a config.json) are relative to `base_dir`, which is the file's own folder unless it says otherwise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from pdlab import batching, load_policy, spellings
from pdlab.cost import CostSpec, kv_capacity_tokens
from pdlab.cost.catalogue import hardware, model
from pdlab.mistakes import mistakes
from pdlab.read_yaml import overridden, read_yaml, replaced
from pdlab.types import Role, UsageError, nearest
from pdlab.workload import builtin
from pdlab.workload.spec import HASH_TOKENS, SYNTHETIC, WorkloadSpec


def _no_bool(value: object) -> object:
    """YAML's `yes` is no number, though Python's True is."""
    if isinstance(value, bool):
        raise ValueError(f"must be a number, not {str(value).lower()}")
    return value


def _hardware(name: str) -> str:
    if name.endswith(".json"):
        return name  # a profile, which is read once `base_dir` is known
    try:
        hardware(name)
    except UsageError as error:
        raise ValueError(str(error)) from None
    return name


def _file_name(name: str) -> str:
    if not name.strip(". ") or set(name) & set("/\\\0"):
        raise ValueError(f"names the folder of the results, which cannot be {name!r}")
    return name


def _batching(name: str) -> str:
    if name not in batching.names():
        raise ValueError(f"{name!r} is not one of {', '.join(batching.names())}{nearest(name, batching.names())}")
    return name


MOST_INSTANCES = 10_000  # of one cluster: beyond, not even their arrival ends in a time that anybody waits

Number = Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False)]
Positive = Annotated[Number, Field(gt=0)]
NotNegative = Annotated[Number, Field(ge=0)]
Fraction = Annotated[Number, Field(gt=0, le=1)]
Count = Annotated[int, BeforeValidator(_no_bool), Field(ge=1)]
Seed = Annotated[int, BeforeValidator(_no_bool), Field(ge=0)]
Hardware = Annotated[str, AfterValidator(_hardware)]
Name = Annotated[str, AfterValidator(_file_name)]
Batching = Annotated[str, AfterValidator(_batching)]


def _plain(value: object) -> object:
    """A part of another experiment, as a file would say it."""
    return value.model_dump(mode="json", exclude_unset=True) if isinstance(value, BaseModel) else value


class Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class EngineSpec(Spec):
    """How an instance runs its batches."""

    block_tokens: Annotated[Count, Field(le=1 << 16)] = 16
    max_batch_tokens: Annotated[Count, Field(le=10_000_000)] = 8192
    max_seqs: Annotated[Count, Field(le=1 << 16)] = 256
    batching: Batching = "chunked"
    prefix_cache: bool = True
    watermark: Annotated[NotNegative, Field(lt=1)] = 0.01
    kv_blocks: Annotated[Count, Field(le=10**12)] | None = None  # None: what the memory holds beside the weights
    hbm_utilization: Fraction = 0.9
    max_model_len: Count | None = None  # tokens of prompt and output together; None: the model's positions


class InstancesSpec(Spec):
    """`count` like instances. Role `auto`: the first `prefill` of them prefill, the others decode."""

    role: Literal["prefill", "decode", "mixed", "auto"]
    count: Count = 1
    prefill: int | None = None
    hardware: Hardware
    tp: Count = 1
    name: str | None = None
    host: str | None = None
    nics: Count | None = None  # None: one an accelerator
    engine: EngineSpec | None = None  # only the keys it gives differ from the experiment's

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
    delay_s: NotNegative = 0.0


class AutoscaleSpec(Spec):
    """Whether a policy's Scale is carried out, and between how many instances in all."""

    enabled: bool = False
    min: Count = 2
    max: Annotated[Count, Field(le=MOST_INSTANCES)] = 16
    start_s: NotNegative = 30.0

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min {self.min} must not be above max {self.max}")
        return self


class ClusterSpec(Spec):
    instances: tuple[InstancesSpec, ...]
    network: NetworkSpec = NetworkSpec()
    reports: ReportsSpec = ReportsSpec()
    role_switch_s: NotNegative = 1.0
    detect_s: NotNegative = 0.5
    autoscale: AutoscaleSpec = AutoscaleSpec()

    @field_validator("instances")
    @classmethod
    def _bounded(cls, rows: tuple[InstancesSpec, ...]) -> tuple[InstancesSpec, ...]:
        if (count := sum(row.count for row in rows)) > MOST_INSTANCES:
            raise ValueError(f"{count:,} instances in all, and at most {MOST_INSTANCES:,} can be had: reduce their count")
        return rows


class TransferSpec(Spec):
    """How KV gets from prefill to decode."""

    mode: Literal["push", "pull"] = "pull"
    granularity: Literal["request", "chunk", "layer"] = "request"
    reserve: Literal["before_prefill", "after_prefill"] | None = None  # None: as the mode needs
    first_token: Literal["prefill", "decode"] = "prefill"
    timeout_s: Positive = 30.0

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.mode == "pull" and self.granularity != "request":
            raise ValueError(f"granularity {self.granularity} is for mode push: write granularity: request, or mode: push")
        if self.mode == "push" and self.reserve == "after_prefill":
            raise ValueError("mode push writes to blocks that were set aside before prefill: write reserve: before_prefill, or mode: pull")
        return self

    @property
    def reserve_first(self) -> bool:
        """Does the decode instance reserve its blocks before prefill starts?"""
        return self.mode == "push" or self.reserve == "before_prefill"


class SloSpec(Spec):
    ttft_s: Positive = 1.0
    tpot_s: Positive = 0.05


KINDS = {
    "kill": ("restart_after_s",),
    "slow": ("factor", "decode_factor", "for_s"),
    "slow_link": ("factor", "for_s"),
    "cut_link": ("for_s",),
    "cut": ("by_s", "for_s"),
    "lose_reports": ("for_s",),
    "delay_reports": ("by_s", "for_s"),
}
NEEDS = {"slow": "factor", "slow_link": "factor", "delay_reports": "by_s"}


class FaultSpec(Spec):
    """At `at_s`, one of: an instance dies (and comes back) or computes slowly, its link slows down or is cut, its reports are lost or
    late; or two of them do not reach each other."""

    at_s: NotNegative
    kill: str | None = None
    slow: str | None = None
    slow_link: str | None = None
    cut_link: str | None = None
    cut: tuple[str, str] | None = None
    lose_reports: str | None = None
    delay_reports: str | None = None
    restart_after_s: Positive | None = None  # None: never
    factor: Annotated[Number, Field(gt=0, le=1)] | None = None
    decode_factor: Annotated[Number, Field(gt=0, le=1)] | None = None
    by_s: Positive | None = None
    for_s: Positive | None = None  # None: to the end

    @property
    def kind(self) -> str:
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    @property
    def instances(self) -> tuple[str, ...]:
        """The names of those it befalls."""
        named = getattr(self, self.kind)
        return (named,) if isinstance(named, str) else tuple(named)

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"a fault is one of {', '.join(KINDS)}, not {' and '.join(given) or 'none of them'}")
        takes = KINDS[given[0]]
        for key in ("restart_after_s", "factor", "decode_factor", "by_s", "for_s"):
            if getattr(self, key) is not None and key not in takes:
                raise ValueError(f"{given[0]} takes no {key}, only {' and '.join(takes)}")
        needed = NEEDS.get(given[0])
        if needed is not None and getattr(self, needed) is None:
            raise ValueError(f"{given[0]} needs {needed}")
        if self.cut is not None and self.cut[0] == self.cut[1]:
            raise ValueError(f"cut names two instances, not {self.cut[0]} twice")
        return self


class LimitsSpec(Spec):
    """Bounds on waiting, so that every state of a request and of an instance ends; and on what is taken in."""

    request_timeout_s: Positive = 900.0
    max_attempts: Count = 3
    lease_s: Positive = 3.0
    probe_s: NotNegative = 2.0
    suspect_s: NotNegative = 15.0
    grace_s: NotNegative = 0.0
    max_in_flight: Count | None = None


@dataclass(frozen=True, slots=True)
class Placement:
    """One instance of the cluster, as the file's rows add up to it."""

    name: str
    role: Role
    hardware: str
    tp: int
    host: str
    nics: int
    engine: EngineSpec
    row: int  # of cluster.instances


class Experiment(Spec):
    """One experiment. `load` reads a file; `Experiment.parse` a mapping."""

    name: Name = "experiment"
    base_dir: Path = Path()
    seed: Seed = 0
    model: str
    workload: WorkloadSpec
    cluster: ClusterSpec
    engine: EngineSpec = EngineSpec()
    transfer: TransferSpec = TransferSpec()
    policy: str | dict[str, Any] = "least_loaded"
    slo: SloSpec = SloSpec()
    faults: tuple[FaultSpec, ...] = ()
    cost: CostSpec = CostSpec()
    limits: LimitsSpec = LimitsSpec()

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Read a YAML file; each override is `key.path=value`, the value in YAML. Raises UsageError with a line for each mistake."""
        path = Path(path)
        mapping = overridden(read_yaml(path), overrides)
        return cls.parse({"name": path.stem, **mapping, "base_dir": path.parent / str(mapping.get("base_dir", ""))}, str(path))

    @classmethod
    def parse(cls, mapping: Mapping[str, Any], source: str = "experiment") -> Self:
        """From plain values, such as `resolved` gives. Raises UsageError with a line for each mistake, after `source`."""
        try:
            return cls.model_validate(mapping)
        except ValidationError as error:
            raise UsageError("\n".join(f"{source}: {line}" for line in mistakes(error, cls))) from None

    def with_(self, changes: Mapping[str, Any] | None = None, /, **more: Any) -> Self:
        """A copy with values replaced, all of it checked: `with_(seed=3)`, `with_(**{"workload.rate": 12})`, and
        `cluster.instances.0.count` for a row. Raises UsageError with a line for each mistake."""
        said = self.model_dump(mode="json", exclude_unset=True)
        wanted = {key: _plain(value) for key, value in {**(changes or {}), **more}.items()}
        try:
            return self.model_validate(replaced(said, wanted))
        except ValidationError as error:
            raise UsageError("\n".join(mistakes(error, type(self)))) from None

    def _repr_html_(self) -> str:
        from pdlab.report.experiment import fragment

        return fragment(self)

    def resolved(self) -> dict[str, Any]:
        """Plain values with every default in place; parsing them gives this experiment again, from any folder."""
        plain: dict[str, Any] = self.model_dump(mode="json", exclude_none=True)
        for row, spec in zip(plain["cluster"]["instances"], self.cluster.instances, strict=True):
            if spec.engine is not None:
                row["engine"] = self._engine(spec).model_dump(mode="json", exclude_none=True)
        return {**plain, "base_dir": str(self.base_dir.resolve())}

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.resolved(), sort_keys=False, width=120, allow_unicode=True)

    def placements(self) -> list[Placement]:
        """Every instance: prefill-0, prefill-1, decode-0, ..., counted through all rows; a row's own `name` in place of the role (and,
        when it counts one, of the number). An instance without `host` has one to itself."""
        return list(self._placed())

    def _placed(self) -> Iterator[Placement]:
        counted: dict[str, int] = {}
        for index, row in enumerate(self.cluster.instances):
            engine = self._engine(row)
            for role in row.roles():
                stem = row.name or str(role)
                number = counted[stem] = counted.get(stem, -1) + 1
                name = stem if row.name and row.count == 1 else f"{stem}-{number}"
                yield Placement(name, role, row.hardware, row.tp, row.host or name, row.nics or row.tp, engine, index)

    def _engine(self, row: InstancesSpec) -> EngineSpec:
        own = row.engine
        return self.engine if own is None else self.engine.model_copy(update={key: getattr(own, key) for key in own.model_fields_set})

    @field_validator("model")
    @classmethod
    def _known_model(cls, name: str, info: ValidationInfo) -> str:
        try:
            model(name, info.data.get("base_dir"))
        except UsageError as error:
            fetch = f"; {spellings.download(name, serve=False)}" if spellings.of_hub(name) else ""
            raise ValueError(f"{error}{fetch}") from None
        return name

    @field_validator("policy")
    @classmethod
    def _known_policy(cls, policy: str | dict[str, Any], info: ValidationInfo) -> str | dict[str, Any]:
        try:
            load_policy.build(policy, info.data.get("base_dir", Path()))
        except UsageError as error:
            raise ValueError(str(error).removeprefix("policy: ").removeprefix("policy ")) from None
        return policy

    @model_validator(mode="after")
    def _possible(self) -> Self:
        placed = self.placements()
        found = [*self._roles(placed), *self._fit(), *self._blocks(placed), *self._targets(placed)]
        if found:
            raise ValueError("\n".join(found))
        return self

    def _roles(self, placed: Sequence[Placement]) -> Iterator[str]:
        if not any(p.role.prefills for p in placed):
            yield "cluster.instances: nobody can prefill; add an instance of role prefill or mixed"
        if not any(p.role.decodes for p in placed):
            yield "cluster.instances: nobody can decode; add an instance of role decode or mixed"
        names = [p.name for p in placed]
        for twice in sorted(name for name, times in Counter(names).items() if times > 1):
            yield f"cluster.instances: two instances are named {twice}; give each row its own name"

    def _fit(self) -> Iterator[str]:
        served = model(self.model, self.base_dir)
        weight_dtype, kv_dtype = self.cost.weights(served), self.cost.kv_dtype
        for index, row in enumerate(self.cluster.instances):
            engine = self._engine(row)
            if engine.max_model_len is not None and 0 < served.max_positions < engine.max_model_len:
                where = "engine" if row.engine is None or row.engine.max_model_len is None else f"cluster.instances.{index}.engine"
                yield f"{where}.max_model_len: {engine.max_model_len} exceeds the {served.max_positions} positions of {self.model}"
            try:
                chip = hardware(row.hardware, self.base_dir)
                if chip.profile is not None:
                    chip.profile.check(served, row.tp)
                if engine.kv_blocks is None:
                    kv_capacity_tokens(
                        served, chip, row.tp, engine.hbm_utilization, weight_dtype, kv_dtype, engine.max_batch_tokens, engine.max_seqs
                    )
            except UsageError as error:
                yield f"cluster.instances.{index}: {error}"

    def _blocks(self, placed: Sequence[Placement]) -> Iterator[str]:
        """What does not go with the workload's prefix hashes, so far as the file tells them; a trace's are known when it is read."""
        source = self.workload.source
        hash_tokens = (self.workload.hash_tokens or HASH_TOKENS) if source == SYNTHETIC else None
        if source in builtin.NAMES:  # those that share no prefixes leave a server its own blocks
            hash_tokens = builtin.figures(source).get("prefix", {}).get("hash_tokens")
        if hash_tokens is not None:
            for block_tokens in dict.fromkeys(p.engine.block_tokens for p in placed):
                if mistake := indivisible(hash_tokens, block_tokens):
                    yield mistake

    def _targets(self, placed: Sequence[Placement]) -> Iterator[str]:
        names = [p.name for p in placed]
        for index, fault in enumerate(self.faults):
            for named in fault.instances:
                if named not in names:
                    yield f"faults.{index}.{fault.kind}: no instance is named {named!r}; there are {', '.join(names)}"


def indivisible(hash_tokens: int, block_tokens: int) -> str | None:
    """What is said where an instance's blocks do not divide the `hash_tokens` behind one of the workload's prefix hashes."""
    if hash_tokens % block_tokens == 0:
        return None
    divisor = max(d for d in range(1, min(block_tokens, hash_tokens) + 1) if hash_tokens % d == 0)
    return (
        f"engine.block_tokens {block_tokens} does not divide the {hash_tokens} tokens behind one prefix hash of the workload; "
        f"choose a divisor, such as {divisor}"
    )
