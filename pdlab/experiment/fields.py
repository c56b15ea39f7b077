"""What the models of the experiment file are made of: numbers with bounds, names that are checked, and which world uses a key."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field
from pydantic.fields import FieldInfo

from pdlab import batching
from pdlab.core.strict import Strict
from pdlab.core.types import UsageError
from pdlab.cost.accelerator import AcceleratorSpec
from pdlab.cost.catalogue import hardware


class Spec(Strict):
    """A part of the file that `unused` and `used` look into."""


@dataclass(frozen=True, slots=True)
class Use:
    """How the two worlds use a key, in a few words; empty: not at all. A key without it is used by both, as it stands."""

    sim: str = "yes"
    serve: str = "yes"
    served: Callable[[Any], bool] | None = None  # which of its values `serve` uses; None: all

    def by(self, world: str, value: object) -> bool:
        """Does that world use it?"""
        return bool(getattr(self, world)) and (world != "serve" or self.served is None or self.served(value))


SIM, SERVE = Use(serve=""), Use(sim="")  # whose alone a key is

FORMAT = Use(sim="as `cost` leaves formats open; not of measured hardware")


def measured(hardware: object) -> bool:
    """Does it name a profile that `pdlab calibrate` wrote?"""
    return isinstance(hardware, str) and hardware.endswith(".json")


PROFILE = Use(serve="a measured profile (.json), for predictors", served=measured)


def use_of(field: FieldInfo) -> Use:
    return next((mark for mark in field.metadata if isinstance(mark, Use)), Use())


def unused(plain: Mapping[str, Any], model: type[BaseModel], world: str) -> Iterator[str]:
    """The keys of `plain` that `world` ("sim" or "serve") does not use, by their paths without the numbers of rows. What is no key is
    nobody's."""
    for key, value in plain.items():
        if (field := model.model_fields.get(key)) is None:
            continue
        if not use_of(field).by(world, value):
            yield key
        elif (inner := nested(field)) is not None:
            parts = value if isinstance(value, list | tuple) else [value]
            for part in parts:
                if isinstance(part, Mapping):
                    yield from (f"{key}.{path}" for path in unused(part, inner, world))


def used(plain: Mapping[str, Any], model: type[BaseModel], world: str) -> dict[str, Any]:
    """`plain` without those keys."""
    kept: dict[str, Any] = {}
    for key, value in plain.items():
        field = model.model_fields.get(key)
        if field is None:
            kept[key] = value
        elif use_of(field).by(world, value):
            kept[key] = _used(value, nested(field), world)
    return kept


def _used(value: Any, inner: type[BaseModel] | None, world: str) -> Any:
    if inner is None:
        return value
    if isinstance(value, list | tuple):
        return [_used(part, inner, world) for part in value]
    return used(value, inner, world) if isinstance(value, Mapping) else value


def ignored_line(world: str, because: Mapping[str, Sequence[str]]) -> str:
    """What is said of keys that are not used, reason by reason; empty where there are none."""
    parts = [f"since {reason}: {', '.join(keys)}" for reason, keys in because.items() if keys]
    return f"{world}: ignored, {'; '.join(parts)}" if parts else ""


def nested(field: FieldInfo) -> type[BaseModel] | None:
    """The model that a field's mapping, or each of its list, is read as; None where it is a plain value or there is a choice."""
    kind = field.annotation
    arguments = [part for part in getattr(kind, "__args__", ()) if part is not type(None) and part is not ...]
    if len(arguments) == 1:
        kind = arguments[0]
    return kind if isinstance(kind, type) and issubclass(kind, Spec) else None


def _hardware(name: str | AcceleratorSpec) -> str | AcceleratorSpec:
    if measured(name):
        return name  # a profile, which is read once `base_dir` is known
    try:
        hardware(name)
    except UsageError as error:
        raise ValueError(str(error)) from None
    return name


def _file_name(name: str) -> str:
    if not name.strip(". ") or set(name) & set("/\\") or not name.isprintable() or len(name.encode()) > 200:
        raise ValueError(f"names the folder of the results, which cannot be {name!r}")
    return name


def _batching(asked: object) -> object:
    if not isinstance(asked, str | Mapping):
        return asked  # which pydantic refuses
    try:
        return batching.spelled(asked)
    except UsageError as error:
        raise ValueError(str(error).removeprefix("engine.batching: ")) from None


Number = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[Number, Field(gt=0)]
NotNegative = Annotated[Number, Field(ge=0)]
Fraction = Annotated[Number, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0)]
Hardware = Annotated[str | AcceleratorSpec, AfterValidator(_hardware)]
Name = Annotated[str, AfterValidator(_file_name)]
KvCacheDtype = Literal["auto", "fp8", "fp8_e4m3", "bfloat16", "float16", "float32"]
Batching = Annotated[str, BeforeValidator(_batching)]
Device = Annotated[str, Field(pattern=r"^(cpu|(cuda|npu)(:\d+)?)$")]
