"""The experiment file as a whole: what runs, and what is asked about it.

    experiment = Experiment.load("experiments/quickstart.yaml", ["workload.rate=12", "cluster.instances.0.count=3"])

docs/reference/experiment-file.md explains every key to the user.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationInfo, field_validator

from pdlab.core.types import UsageError
from pdlab.cost import CostSpec, kv_capacity_tokens
from pdlab.cost.catalogue import hardware, model
from pdlab.cost.parallel import fitting
from pdlab.experiment import spellings
from pdlab.experiment.cluster import ClusterSpec, EngineSpec, Placement
from pdlab.experiment.deployment import Deployment, roles_missing
from pdlab.experiment.fields import ignored_line, unused
from pdlab.experiment.fields import measured as is_profile
from pdlab.experiment.html import fragment
from pdlab.experiment.study import Study
from pdlab.workload import builtin
from pdlab.workload.spec import HASH_TOKENS, SYNTHETIC

FORMATS = {"auto": None, "float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "fp8": "fp8", "fp8_e4m3": "fp8"}


class Trial(Study, Deployment):
    """The file as `pdlab bench` reads it: a workload for a server that runs, with no need of what only the simulator asks."""

    @classmethod
    def _own(cls, mapping: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
        return dict(mapping), ()


class Experiment(Trial):
    """`load` reads a file; `Experiment.parse` a mapping."""

    cluster: ClusterSpec

    @property
    def formats(self) -> CostSpec:
        """Of instances that have no `engine` of their own."""
        return self.formats_of(self.engine)

    def formats_of(self, engine: EngineSpec) -> CostSpec:
        """`cost`, with the number formats that `dtype`, `quantization` and an engine's `kv_cache_dtype` ask for where it names none."""
        own, plain = self.cost, FORMATS[self.dtype]
        kv = own.kv_dtype or FORMATS[engine.kv_cache_dtype] or plain
        return own.model_copy(update={"weight_dtype": own.weight_dtype or self.quantization or plain, "kv_dtype": kv})

    @property
    def ignored(self) -> str:
        """A line that says which of the keys given a simulation does not use, and why; empty where it uses all."""
        said = self.model_dump(mode="json", exclude_unset=True)
        of_cost = [f"cost.{key}" for key in ("weight_dtype", "kv_dtype") if said.get("cost", {}).get(key) is not None]
        formats = [key for key in ("dtype", "quantization") if said.get(key) is not None]
        formats += ["engine.kv_cache_dtype"] if any(p.engine.kv_cache_dtype != "auto" for p in self.placements()) else []
        measured = any(is_profile(row.hardware) for row in self.cluster.instances)
        return ignored_line(
            "sim",
            {
                "they are for pdlab serve": [key for key in dict.fromkeys(unused(said, type(self), "sim")) if key != "plan"],
                "it is for pdlab plan": ["plan"] if self.plan is not None else [],
                "measured hardware has the formats it was measured with": [*formats, *of_cost] if measured else [],
            },
        )

    def _repr_html_(self) -> str:
        return fragment(self.name, _lines(self), self.to_yaml())

    @field_validator("model")
    @classmethod
    def _known_model(cls, name: str, info: ValidationInfo) -> str:
        try:
            model(name, info.data.get("base_dir"))
        except UsageError as error:
            fetch = f"; {spellings.download(name, serve=False)}" if spellings.of_hub(name) else ""
            raise ValueError(f"{error}{fetch}") from None
        return name

    def _wrong(self, placed: Sequence[Placement]) -> Iterator[str]:
        if not placed:
            yield from roles_missing(placed)
        yield from super()._wrong(placed)
        missing = [
            f"cluster.instances.{index}.hardware: is missing" for index, row in enumerate(self.cluster.instances) if not row.hardware
        ]
        yield from missing
        if self.cost.kv_dtype is not None and any(p.engine.kv_cache_dtype != "auto" for p in placed):
            yield "cost.kv_dtype: engine.kv_cache_dtype says what KV is kept in: remove one of the two"
        if not missing:
            yield from self._fit()
        yield from self._blocks(placed)
        yield from self._targets(placed)

    def _fit(self) -> Iterator[str]:
        served = model(self.model, self.base_dir)
        for index, row in enumerate(self.cluster.instances):
            engine = self._engine(row)
            formats = self.formats_of(engine)
            weight_dtype, kv_dtype = formats.weights(served), formats.kv
            if engine.max_model_len is not None and 0 < served.max_positions < engine.max_model_len:
                where = "engine" if row.engine is None or row.engine.max_model_len is None else f"cluster.instances.{index}.engine"
                yield f"{where}.max_model_len: {engine.max_model_len} exceeds the {served.max_positions} positions of {self.model}"
            try:
                chip = hardware(row.hardware or "", self.base_dir)
                if chip.profile is not None:
                    chip.profile.check(served, row.tp)
                fitting(served, row.parallel)
                drafts = None if engine.speculation is None else engine.speculation.drafts(served, self.base_dir)
                if engine.kv_blocks is None:
                    kv_capacity_tokens(
                        served,
                        chip,
                        row.parallel,
                        engine.hbm_utilization,
                        weight_dtype,
                        kv_dtype,
                        engine.max_batch_tokens,
                        engine.max_seqs,
                        None if drafts is None else drafts.model,
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


def _lines(experiment: Experiment) -> list[tuple[str, str]]:
    workload, slo = experiment.workload, experiment.slo
    counts = [f"{workload.requests:,} requests" if workload.requests is not None else "all requests"]
    counts += [f"{workload.rate:g} requests/s"] if workload.rate is not None else []
    rows = [
        f"{row.count} x {row.role} on {row.hardware}" + (f", {row.parallel}" if row.parallel.gpus > 1 else "")
        for row in experiment.cluster.instances
    ]
    return [
        ("model", experiment.model),
        ("workload", ", ".join([str(workload.source), *counts])),
        ("cluster", "; ".join(rows)),
        ("policy", str(experiment.policy)),
        ("objectives", f"TTFT {slo.ttft_s:g} s, TPOT {slo.tpot_s:g} s"),
        ("faults", str(len(experiment.faults)) if experiment.faults else "none"),
        ("seed", str(experiment.seed)),
    ]


def indivisible(hash_tokens: int, block_tokens: int) -> str | None:
    """What is said where an instance's blocks do not divide the `hash_tokens` behind one of the workload's prefix hashes."""
    if hash_tokens % block_tokens == 0:
        return None
    divisor = max(d for d in range(1, min(block_tokens, hash_tokens) + 1) if hash_tokens % d == 0)
    return (
        f"engine.block_tokens {block_tokens} does not divide the {hash_tokens} tokens behind one prefix hash of the workload; "
        f"choose a divisor, such as {divisor}"
    )


def read_back(mapping: Mapping[str, Any], source: str) -> Deployment:
    """What an event log says it was written by: a simulation's experiment, a server's deployment."""
    return (Experiment if "workload" in mapping else Deployment).parse(mapping, source)
