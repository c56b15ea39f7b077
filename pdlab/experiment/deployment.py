"""The experiment file as what runs: a model, the engines that serve it, and the policy that drives them. `pdlab serve` reads it so.

    deployment = Deployment.load("experiments/quickstart.yaml", ["policy=round_robin"])

The keys that are the study's alone are left out before anything is checked, wherever they stand: a file that only serves need not have
them, and what is wrong with them does not keep a server from starting. `unread` names those that the file has.

A mistake is a `UsageError` with one line each: where, what, and the nearest valid key or value. Paths in a file (a trace, a policy,
a config.json) are relative to `base_dir`, which is the file's own folder unless it says otherwise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, PrivateAttr, ValidationError, ValidationInfo, field_validator, model_validator

from pdlab.core.types import UsageError
from pdlab.experiment.cluster import ClusterSpec, EngineSpec, InstancesSpec, Placement
from pdlab.experiment.fields import FORMAT, SERVE, Count, Device, Name, NotNegative, Positive, Seed, Spec, unused, used
from pdlab.experiment.hardware_file import Written, read_accelerators, with_accelerators
from pdlab.experiment.mistakes import mistakes
from pdlab.experiment.study import Study
from pdlab.experiment.yaml import overridden, read_yaml, replaced
from pdlab.policies import load as load_policy

WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes


class TransferSpec(Spec):
    """How KV gets from prefill to decode."""

    mode: Literal["push", "pull"] = "pull"
    granularity: Literal["request", "chunk", "layer"] = "request"
    reserve: Literal["before_prefill", "after_prefill"] | None = None  # None: as the mode needs
    first_token: Literal["prefill", "decode"] = "prefill"
    response_path: Literal["direct", "via_prefill"] = "direct"
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


class LimitsSpec(Spec):
    """Bounds on waiting, so that every state of a request and of an instance ends; and on what is taken in."""

    request_timeout_s: Positive = 900.0
    max_attempts: Count = 3
    lease_s: Positive = 3.0
    probe_s: NotNegative = 2.0
    suspect_s: NotNegative = 15.0
    grace_s: NotNegative = 0.0
    max_in_flight: Count | None = None


class Deployment(Spec):
    """`load` reads a file, `parse` a mapping."""

    name: Name = "experiment"
    base_dir: Path = Path()
    seed: Seed = 0
    model: str
    device: Annotated[Device, SERVE] = "cpu"
    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16"], FORMAT] = "auto"
    quantization: Annotated[Literal["wint8", "wint4"] | None, FORMAT] = None
    registry: Annotated[str | None, SERVE] = None
    cluster: ClusterSpec = ClusterSpec(instances=())
    engine: EngineSpec = EngineSpec()
    transfer: TransferSpec = TransferSpec()
    policy: str | dict[str, Any] = "least_loaded"
    slo: SloSpec = SloSpec()
    limits: LimitsSpec = LimitsSpec()

    _unread: tuple[str, ...] = PrivateAttr(())
    _accelerators: Written = PrivateAttr({})  # which `with_` may name

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = (), hardware_file: Path | None = None) -> Self:
        """Read a YAML file; each override is `key.path=value`, the value in YAML. `hardware_file` has accelerators that its rows name.
        Raises UsageError with a line for each mistake."""
        path = Path(path)
        mapping = overridden(read_yaml(path), overrides)
        base_dir = path.parent / str(mapping.get("base_dir", ""))
        known = {} if hardware_file is None else read_accelerators(hardware_file)
        mapping = with_accelerators(mapping, base_dir, known)
        read = cls.parse({"name": path.stem, **mapping, "base_dir": base_dir}, str(path))
        read._accelerators = known
        return read

    @classmethod
    def parse(cls, mapping: Mapping[str, Any], source: str = "experiment") -> Self:
        """From plain values, such as `resolved` gives. Raises UsageError with a line for each mistake, after `source`."""
        return cls._checked(mapping, f"{source}: ")

    @classmethod
    def _checked(cls, mapping: Mapping[str, Any], before: str = "") -> Self:
        own, unread = cls._own(mapping)
        try:
            read = cls.model_validate(own)
        except ValidationError as error:
            raise UsageError("\n".join(f"{before}{line}" for line in mistakes(error, cls, Study))) from _of_policy(error)
        read._unread = unread
        return read

    @classmethod
    def _own(cls, mapping: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
        """The part of a file that is read, and the keys of the rest."""
        unread = dict.fromkeys([*(key for key in mapping if key in Study.model_fields), *unused(mapping, cls, "serve")])
        kept = {key: value for key, value in mapping.items() if key not in Study.model_fields}
        return used(kept, cls, "serve"), tuple(unread)

    @property
    def unread(self) -> tuple[str, ...]:
        """The keys that the file has for another use."""
        return self._unread

    def with_(self, changes: Mapping[str, Any] | None = None, /, **more: Any) -> Self:
        """A copy with values replaced, all of it checked: `with_(seed=3)`, `with_(**{"workload.rate": 12})`, and
        `cluster.instances.0.count` for a row. Raises UsageError with a line for each mistake."""
        said = self.model_dump(mode="json", exclude_unset=True)
        wanted = {key: _plain(value) for key, value in {**(changes or {}), **more}.items()}
        copy = self._checked(with_accelerators(replaced(said, wanted), self.base_dir, self._accelerators))
        copy._accelerators = self._accelerators
        return copy

    @property
    def doubts(self) -> list[str]:
        """Values that can be, and hardly are meant: objectives in milliseconds."""
        limits = (("ttft_s", self.slo.ttft_s, 100.0), ("tpot_s", self.slo.tpot_s, 2.0))
        return [
            f"slo.{key}: {value:g} seconds; did you mean {value / 1000:g}?" for key, value, most in limits if most <= value < 100 * most
        ]

    def resolved(self) -> dict[str, Any]:
        """Plain values with every default in place; parsing them gives this again, from any folder."""
        plain: dict[str, Any] = self.model_dump(mode="json", exclude_none=True)
        for row, spec in zip(plain["cluster"]["instances"], self.cluster.instances, strict=True):
            if spec.engine is not None:
                row["engine"] = self._engine(spec).model_dump(mode="json", exclude_none=True)
        return self._own({**plain, "base_dir": str(self.base_dir.resolve())})[0]

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.resolved(), sort_keys=False, width=120, allow_unicode=True)

    def placements(self) -> list[Placement]:
        """Every instance: prefill-0, prefill-1, decode-0, ..., counted through all rows; a row's own `name` in place of the role (and,
        when it counts one, of the number). An instance without `host` has one to itself."""
        return list(self._placed())

    def place_of(self, name: str, role: str) -> Placement | None:
        """What the file says of an instance started by hand: the one of that name, else any of that role; None where it has no such role.
        Raises UsageError where those of the role differ."""
        placed = self.placements()
        if (named := next((one for one in placed if one.name == name), None)) is not None:
            return named
        alike = {
            (one.hardware, one.parallel, one.engine, one.device, one.rack, one.zone): one for one in reversed(placed) if one.role == role
        }
        if len(alike) > 1:
            names = ", ".join(sorted(one.name for one in alike.values()))
            raise UsageError(f"cluster.instances: instances of role {role} differ: say with --instance-name which it is, such as {names}")
        return next(iter(alike.values()), None)

    def _placed(self) -> Iterator[Placement]:
        counted: dict[str, int] = {}
        for index, row in enumerate(self.cluster.instances):
            engine = self._engine(row)
            for role in row.roles():
                stem = row.name or str(role)
                number = counted[stem] = counted.get(stem, -1) + 1
                name = stem if row.name and row.count == 1 else f"{stem}-{number}"
                yield Placement(
                    name=name,
                    role=role,
                    hardware=row.hardware or "",
                    parallel=row.parallel,
                    host=row.host or name,
                    nics=row.nics or row.parallel.gpus,
                    engine=engine,
                    device=row.device or self.device,
                    row=index,
                    rack=row.rack,
                    zone=row.zone,
                )

    def _engine(self, row: InstancesSpec) -> EngineSpec:
        own = row.engine
        return self.engine if own is None else self.engine.model_copy(update={key: getattr(own, key) for key in own.model_fields_set})

    @field_validator("policy")
    @classmethod
    def _known_policy(cls, policy: str | dict[str, Any], info: ValidationInfo) -> str | dict[str, Any]:
        try:
            load_policy.build(policy, info.data.get("base_dir", Path()))
        except UsageError as error:
            raise ValueError(str(error).removeprefix("policy: ").removeprefix("policy ")) from error
        return policy

    @field_validator("registry")
    @classmethod
    def _no_secret(cls, url: str | None) -> str | None:
        if url is not None and urlsplit(url).password:
            raise ValueError("a password does not belong into a file: give it by PDLAB_REGISTRY_PASSWORD, or PDLAB_REGISTRY_PASSWORD_FILE")
        return url

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if wrong := list(self._wrong(self.placements())):
            raise ValueError("\n".join(wrong))
        return self

    def _wrong(self, placed: Sequence[Placement]) -> Iterator[str]:
        """What is wrong with the whole."""
        if placed:
            yield from roles_missing(placed)
        names = Counter(p.name for p in placed)
        yield from dict.fromkeys(line for p in placed if (line := self._too_wide(p.engine.kv_cache_dtype)))
        for twice in sorted(name for name, times in names.items() if times > 1):
            yield f"cluster.instances: two instances are named {twice}; give each row its own name"

    def _too_wide(self, kv: str) -> str:
        """Why KV cannot be kept so, beside what is computed in `dtype`."""
        if "auto" in (kv, self.dtype) or kv == self.dtype or WIDTHS.get(kv, 1) < WIDTHS[self.dtype]:
            return ""
        return f"engine.kv_cache_dtype: {kv} is no narrower than dtype {self.dtype}, which is computed in: write auto, or a narrower one"


def roles_missing(placed: Sequence[Placement]) -> Iterator[str]:
    if not any(p.role.prefills for p in placed):
        yield "cluster.instances: nobody can prefill; add an instance of role prefill or mixed"
    if not any(p.role.decodes for p in placed):
        yield "cluster.instances: nobody can decode; add an instance of role decode or mixed"


def _of_policy(error: ValidationError) -> BaseException | None:
    """What a policy's own code raised, for whoever wants to see all of it."""
    raised = [detail.get("ctx", {}).get("error") for detail in error.errors(include_url=False)]
    causes = [one.__cause__ for one in raised if one is not None]
    return next((cause.__cause__ for cause in causes if isinstance(cause, UsageError)), None)


def _plain(value: object) -> object:
    """A part of another experiment, as a file would say it."""
    return value.model_dump(mode="json", exclude_unset=True) if isinstance(value, BaseModel) else value
