"""The experiment's optional `cost:` mapping, and the cost model it asks for.

cost: {}                                        # roofline, with the coefficients of the accelerator's family
cost: {roofline: h100-vllm, kv_dtype: fp8}      # another shipped set, or a mapping of Coefficients' fields
cost: {table: profiles/h100_llama8b.json}       # relative to the experiment file; or a shipped table's name
cost: {fitted: distserve-opt-13b-a100}          # a shipped profile, or a mapping of FittedCoefficients' fields
cost: {factors: {decode: 1.1}}                  # what if decode steps take a tenth longer than that?
"""

from __future__ import annotations

from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator, model_validator

from pdlab.core.strict import Strict
from pdlab.core.types import UsageError
from pdlab.cost.base import Cost
from pdlab.cost.dtypes import dtype_bytes
from pdlab.cost.fitted import Fitted, FittedCoefficients, shipped_fit
from pdlab.cost.hardware import Hardware
from pdlab.cost.measured import MeasuredCost
from pdlab.cost.parallel import Parallel, fitting
from pdlab.cost.profile import InstanceProfile
from pdlab.cost.roofline import Coefficients, Drafts, Roofline, coefficients, coefficients_of
from pdlab.cost.scaled import Scaled
from pdlab.cost.shapes import Model
from pdlab.cost.table import Table, load_profile, table_path

PREFILL_TOKENS = (1, 64, 128, 256, 512, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
DECODE_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
DECODE_CONTEXTS = (128, 512, 1024, 2048, 4096, 8192)


Factor = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class CostFactors(Strict):
    """What seconds are multiplied by: of prompts, of decode steps, of bytes on links, of the front end before a first token."""

    prefill: Factor = 1.0
    decode: Factor = 1.0
    link: Factor = 1.0
    front: Factor = 1.0


class CostSpec(Strict):
    """How to cost steps. At most one of roofline, table, fitted; formats left None are the model's published one for weights, and
    bf16 for KV."""

    roofline: str | Coefficients | None = None
    table: str | None = None
    fitted: str | FittedCoefficients | None = None
    extrapolate: bool = False  # let a table go on linearly beyond its grid
    weight_dtype: str | None = None
    kv_dtype: str | None = None
    factors: CostFactors | None = None

    @field_validator("weight_dtype", "kv_dtype")
    @classmethod
    def _known_dtype(cls, value: str | None) -> str | None:
        try:
            if value is not None:
                dtype_bytes(value)
        except UsageError as error:
            raise ValueError(str(error)) from None
        return value

    @model_validator(mode="after")
    def _one_kind(self) -> CostSpec:
        given = [name for name in ("roofline", "table", "fitted") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"cost takes one of roofline, table, fitted, not {' and '.join(given)}")
        if self.extrapolate and self.table is None:
            raise ValueError("extrapolate is for a table: remove it, or give table")
        return self

    def weights(self, model: Model) -> str:
        """The number format of the weights: as given, or as the model is published."""
        return self.weight_dtype or model.weight_dtype

    @property
    def kv(self) -> str:
        """The number format of the KV cache."""
        return self.kv_dtype or "bf16"


def build(
    spec: CostSpec,
    model: Model,
    hardware: Hardware,
    parallel: Parallel | int = 1,
    base_dir: Path | None = None,
    like: str = "vllm",
    drafts: Drafts | None = None,
) -> Cost:
    """The cost of `model` on so many `hardware` (a number is a tp), under an engine like that one; a table's path is relative to
    `base_dir`. Measured hardware costs what was measured, unless a table or a fit is given. Raises UsageError on unknown names, an
    unreadable table, ranks that do not divide the model or are not in the profile, a profile of another model, or drafts beside what knows
    none."""
    cost, factors = _build(spec, model, hardware, parallel, base_dir, like, drafts), spec.factors
    if factors is None or factors.prefill == factors.decode == factors.front == 1.0:
        return cost
    return Scaled(cost, factors.prefill, factors.decode, factors.front)


def _build(
    spec: CostSpec, model: Model, hardware: Hardware, parallel: Parallel | int, base_dir: Path | None, like: str, drafts: Drafts | None
) -> Cost:
    spread = fitting(model, parallel)
    if drafts is not None and (spec.table is not None or spec.fitted is not None or hardware.profile is not None):
        raise UsageError(
            "engine.speculation: a table, a fit and a measured profile have no draft layer: remove it, or cost by the roofline"
        )
    if spec.table is not None:
        return Table(load_profile(table_path(spec.table, base_dir or Path())), spec.extrapolate)
    if spec.fitted is not None:
        return Fitted(shipped_fit(spec.fitted, spread.tp) if isinstance(spec.fitted, str) else spec.fitted)
    if hardware.profile is not None:
        if spec.roofline is not None:
            raise UsageError(f"hardware {hardware.name} is a measured profile, which has no roofline: remove cost.roofline")
        hardware.profile.check(model, spread.tp)
        return MeasuredCost(hardware.profile.steps, hardware.profile.overheads, hardware.name)
    achieved = coefficients(spec.roofline) if isinstance(spec.roofline, str) else spec.roofline
    return Roofline(model, hardware, spread, achieved or coefficients_of(hardware, like), spec.weights(model), spec.kv, drafts)


def measured_profiles(
    profile: InstanceProfile, max_batch_tokens: int, max_seqs: int, kv_tokens: int
) -> tuple[tuple[tuple[int, float], ...], tuple[tuple[int, int, float], ...]]:
    """`profiles` of what `pdlab calibrate` has measured."""
    return profiles(MeasuredCost(profile.steps, profile.overheads, profile.name), max_batch_tokens, max_seqs, kv_tokens)


def profiles(
    cost: Cost, max_batch_tokens: int = 8192, max_seqs: int = 256, kv_tokens: int | None = None
) -> tuple[tuple[tuple[int, float], ...], tuple[tuple[int, int, float], ...]]:
    """Sample a cost for InstanceSpec: ((prompt_tokens, seconds), ...) of one prompt computed alone in chunks of `max_batch_tokens`, and
    ((batch, context_tokens in all, seconds), ...) within `max_seqs` and `kv_tokens`. Points that a table does not cover are left out."""
    already = cost.extrapolated if isinstance(cost, Table) else 0
    prefill = []
    for tokens in PREFILL_TOKENS:
        chunks = [(min(max_batch_tokens, tokens - start), start) for start in range(0, tokens, max_batch_tokens)]
        with suppress(UsageError):
            prefill.append((tokens, sum(cost.prefill_s([chunk]) for chunk in chunks)))
    decode = []
    for batch, each in product(DECODE_BATCHES, DECODE_CONTEXTS):
        context = batch * each
        if batch <= max_seqs and (kv_tokens is None or context <= kv_tokens):
            with suppress(UsageError):
                decode.append((batch, context, cost.decode_s(batch, context)))
    if isinstance(cost, Table):
        cost.extrapolated = already  # sampling is not use
    return tuple(prefill), tuple(decode)
