"""What `pdlab calibrate` has measured of one instance: step times, KV memory, transfers, overheads, and how far the fit can be trusted.

It is JSON, and stands where an experiment names its `hardware`. It holds for the model it was measured with: another of the same shape
costs the same, any other is refused. Only the simulator's part of it is read by the simulator; machine, points and errors are for people.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from pdlab.core.file_kinds import INSTANCE_PROFILE
from pdlab.core.json_file import json_model
from pdlab.core.types import UsageError
from pdlab.cost.shapes import Model
from pdlab.cost.table import DecodeGrid, PrefillGrid, check_grid

SCHEMA = 1


class ProfilePart(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Machine(ProfilePart):
    """Where it was measured. `threads` of a CPU engine; 0: not known."""

    cpu: str
    cores: int = Field(ge=1)
    memory_bytes: int = Field(ge=0)
    threads: int = Field(default=0, ge=0)
    system: str = ""


class ModelShape(ProfilePart):
    """Whose step times these are. `fingerprint` is that of its weights and number formats; empty over HTTP."""

    name: str
    fingerprint: str = ""
    layers: int = Field(ge=1)
    hidden: int = Field(ge=1)
    heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    vocab: int = Field(ge=1)
    dtype: str = ""
    kv_bytes_per_token: int = Field(ge=1)

    def mismatch(self, model: Model) -> str:
        """In what `model` differs, or ""."""
        for key in ("layers", "hidden", "heads", "kv_heads", "head_dim", "vocab"):
            own, other = getattr(self, key), getattr(model, key)
            if own != other:
                return f"it has {own} {key}, {model.name} {other}"
        return ""


class EngineShape(ProfilePart):
    """How the instance batches, and its KV memory; `kv_blocks` 0: not known."""

    device: str = ""
    block_tokens: int = Field(ge=1)
    kv_blocks: int = Field(ge=0)
    max_batch_tokens: int = Field(ge=1)
    max_seqs: int = Field(ge=1)
    max_tokens: int = Field(ge=1)  # prompt and output of one request
    temperature: float = Field(default=0.0, ge=0.0)


class AddedGrid(ProfilePart):
    """seconds[i][j] that batch[j] decodes of short context add to a step of tokens[i] prompt tokens."""

    tokens: tuple[int, ...]
    batch: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]

    @model_validator(mode="after")
    def _shape(self) -> AddedGrid:
        check_grid("tokens", self.tokens, "batch", self.batch, self.seconds, least_s=0.0)
        return self


class StepTimes(ProfilePart):
    """The fit. `prompt_s`: each further prompt that ends in the same step. `unfinished_chunk_saving_s`: what a step takes less in which
    none ends, and nothing decodes. `additive`: mixed steps and several prompts were not seen, but are put together from what was."""

    prefill: PrefillGrid
    decode: DecodeGrid
    added: AddedGrid
    prompt_s: float = Field(default=0.0, ge=0.0)
    unfinished_chunk_saving_s: float = Field(default=0.0, ge=0.0)
    additive: bool = False


class Overheads(ProfilePart):
    """Seconds besides engine steps: of a request (front end to engine, engine to client), that a router adds to it, that telling each token
    adds to its step, until a transfer's first byte flows, and of the first step with prompts of each size (tokens in all), for which an
    engine's libraries make kernels."""

    request_s: float = Field(default=0.0, ge=0.0)
    router_s: float = Field(default=0.0, ge=0.0)
    token_s: float = Field(default=0.0, ge=0.0)
    handoff_s: float = Field(default=0.0, ge=0.0)
    new_size_s: float = Field(default=0.0, ge=0.0)


class Interference(ProfilePart):
    """Seconds that a step takes longer while another engine computes on the same machine: engines of one CPU share its memory, from which
    every step reads all weights, however many tokens it has; and what a prefill computes besides, for each of its tokens. A step with
    prompt tokens is a prefill."""

    prefill_beside_prefill_s: float = Field(default=0.0, ge=0.0)
    prefill_beside_decode_s: float = Field(default=0.0, ge=0.0)
    prefill_token_beside_prefill_s: float = Field(default=0.0, ge=0.0)
    prefill_token_beside_decode_s: float = Field(default=0.0, ge=0.0)
    decode_beside_prefill_s: float = Field(default=0.0, ge=0.0)
    decode_beside_decode_s: float = Field(default=0.0, ge=0.0)

    @property
    def matters(self) -> bool:
        return any(self.model_dump().values())

    def added_s(self, prefill_tokens: int, other_prefill: bool) -> float:
        """To a step with so many tokens where some are of prompts, or 0: to a decode."""
        if prefill_tokens:
            if other_prefill:
                return self.prefill_beside_prefill_s + prefill_tokens * self.prefill_token_beside_prefill_s
            return self.prefill_beside_decode_s + prefill_tokens * self.prefill_token_beside_decode_s
        return self.decode_beside_prefill_s if other_prefill else self.decode_beside_decode_s


class BesideSeen(ProfilePart):
    """How much longer, in seconds, steps of one engine took once while another was busy with `load` than just before: a prompt of
    `few_tokens`, one of `many_tokens`, and a decode. By chance some take less."""

    load: Literal["prefill", "decode"]
    few_tokens: int = Field(ge=1)
    many_tokens: int = Field(ge=1)
    few_s: float
    many_s: float
    decode_s: float


class FrontCosts(ProfilePart):
    """What serves an engine (HTTP, router, client) computes: seconds of a request, of each step whose tokens are told, of each of these
    tokens. They pass beside the engine where the machine has a core to spare; else on a core that an engine computes on, whose steps take
    so much longer."""

    request_s: float = Field(default=0.0, ge=0.0)
    step_s: float = Field(default=0.0, ge=0.0)
    token_s: float = Field(default=0.0, ge=0.0)

    @property
    def matters(self) -> bool:
        return any(self.model_dump().values())


class CoreSpeed(ProfilePart):
    """A machine whose cores are now and then slower, since a host gives the other half of a physical core to another guest. There a short
    loop takes r times the CPU time that it takes undisturbed, and the engine's steps 1 + share (r - 1) times: `prefill_share` of those with
    prompts, `decode_share` of the others. Undisturbed the loop takes `prefill_loop_s` beside the former, `decode_loop_s` beside the latter:
    some processors lower their clock for what these compute."""

    prefill_loop_s: float = Field(default=0.0, ge=0.0)
    decode_loop_s: float = Field(default=0.0, ge=0.0)
    prefill_share: float = Field(default=0.0, ge=0.0)
    decode_share: float = Field(default=0.0, ge=0.0)

    def slower(self, loop_s: float, *, prefill: bool) -> float:
        """r while the loop takes so long beside steps of that kind; 1 at least, and where nothing is known."""
        calm_s = self.prefill_loop_s if prefill else self.decode_loop_s
        return max(1.0, loop_s / calm_s) if calm_s else 1.0

    def longer(self, slower: float, *, prefill: bool) -> float:
        """By what a step is multiplied where the loop takes `slower` times as long as undisturbed."""
        return 1.0 + (self.prefill_share if prefill else self.decode_share) * (slower - 1.0)


class Moved(ProfilePart):
    """One size of transfer: its bytes, and seconds of each."""

    bytes: int = Field(ge=0)
    seconds: tuple[float, ...]


class TransferFit(ProfilePart):
    """Seconds of a transfer: `Overheads.handoff_s` + bytes / bytes_per_s."""

    transport: str
    bytes_per_s: float = Field(gt=0.0)
    mean_error: float = 0.0
    moved: tuple[Moved, ...] = ()


class Point(ProfilePart):
    """One kind of step, measured. `tokens` new tokens of each of `prompts`, after `cached`, which end with them or do not; `batch` decodes
    of `context` KV tokens each."""

    tokens: int = Field(default=0, ge=0)
    cached: int = Field(default=0, ge=0)
    prompts: int = Field(default=1, ge=0)
    batch: int = Field(default=0, ge=0)
    context: int = Field(default=0, ge=0)
    ends: bool = True
    held_out: bool = False

    @property
    def kind(self) -> str:
        """prefill, cached (a prefill after cached tokens), prompts (several in a step), unfinished, decode, or mixed."""
        if self.batch:
            return "mixed" if self.tokens else "decode"
        if not self.ends:
            return "unfinished"
        if self.prompts > 1:
            return "prompts"
        return "cached" if self.cached else "prefill"


class MeasuredPoint(ProfilePart):
    """A point, and the seconds of each repeat; `loop_s`: what the loop of `CoreSpeed` took meanwhile, where that was looked at."""

    point: Point
    seconds: tuple[float, ...] = Field(min_length=1)
    loop_s: tuple[float, ...] = ()

    @property
    def median_s(self) -> float:
        ordered = sorted(self.seconds)
        half = len(ordered) // 2
        return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2

    @property
    def mean_s(self) -> float:
        return sum(self.seconds) / len(self.seconds)


class FitError(ProfilePart):
    """Of the held-out points of a kind: relative, absolute values."""

    kind: str
    points: int
    mean: float
    worst: float


class InstanceProfile(ProfilePart):
    """A profile, as kept in JSON."""

    schema_version: int = SCHEMA
    name: str
    made_at: str = ""  # ISO 8601, UTC
    pdlab: str = ""
    how: str = ""  # in process, or the URL
    machine: Machine
    model: ModelShape
    engine: EngineShape
    steps: StepTimes
    overheads: Overheads = Overheads()
    beside: Interference = Interference()
    front: FrontCosts = FrontCosts()
    unsteady: CoreSpeed = CoreSpeed()
    transfer: TransferFit | None = None
    errors: tuple[FitError, ...] = ()
    warnings: tuple[str, ...] = ()
    points: tuple[MeasuredPoint, ...] = ()
    beside_seen: tuple[BesideSeen, ...] = ()
    references: tuple[MeasuredPoint, ...] = ()  # some of which all calibrations have many repeats

    @field_validator("schema_version")
    @classmethod
    def _known(cls, version: int) -> int:
        if version != SCHEMA:
            raise ValueError(f"this pdlab reads version {SCHEMA}, not {version}: measure again with pdlab calibrate")
        return version

    def check(self, model: Model, tp: int = 1) -> None:
        """Raises UsageError where it was measured with another model, or does not know this tp."""
        if different := self.model.mismatch(model):
            raise UsageError(f"profile {self.name} was measured with {self.model.name}, not {model.name} ({different}): measure that one")
        if tp != 1:
            raise UsageError(f"profile {self.name} is of a whole instance: write tp: 1, not {tp}")

    def kv_tokens(self) -> int:
        """That the instance holds. Raises UsageError where the server did not say."""
        if not self.engine.kv_blocks:
            raise UsageError(f"profile {self.name} does not know the instance's KV memory: give engine.kv_blocks")
        return self.engine.kv_blocks * self.engine.block_tokens


def load_instance_profile(path: Path) -> InstanceProfile:
    """Read a profile. Raises UsageError when it is missing, no profile, or malformed, naming the first wrong place."""
    return json_model(
        path, InstanceProfile, "hardware profile", INSTANCE_PROFILE, unknown="not known to this pdlab: measure again with pdlab calibrate"
    )


def save_instance_profile(profile: InstanceProfile, path: Path) -> None:
    """Written beside `path` and then renamed, so that nobody ever sees half of it."""
    beside = path.with_name(f".{path.name}.part")
    try:
        beside.write_text(profile.model_dump_json(indent=1) + "\n", encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
