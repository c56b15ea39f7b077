"""Which parameters of a policy are tuned, and between which values; and where in an experiment the policy stands.

TuneSpace.read("xllm_slo_aware", ["switch_cost_s", "min_flip_interval_s=1..30"], base_dir)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Self

import msgspec

from pdlab.core.policy import HOOKS
from pdlab.core.types import UsageError
from pdlab.experiment.experiment import Experiment
from pdlab.policies import load as load_policy
from pdlab.policies.parameters import Parameter, parameters

_DIGITS = 4  # of a number that is tried: what is judged is what is written down


@dataclass(frozen=True, slots=True)
class TunedParameter:
    """Between `low` and `high`, ends included, or one of `choices`; `optional`: None is tried, too."""

    name: str
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False
    choices: tuple[Any, ...] | None = None
    optional: bool = False

    def rounded(self, value: float) -> float | int:
        """To what a person would write, within the bounds."""
        if self.whole:
            return round(value)
        return min(max(float(f"{value:.{_DIGITS}g}"), self.low), self.high)

    def holds(self, value: Any) -> bool:
        """Is it one of those that are tried?"""
        if value is None:
            return self.optional
        if self.choices is not None:
            return value in self.choices
        return bool(self.low <= value <= self.high)

    @property
    def plain(self) -> list[Any]:
        """What a study is kept by."""
        ends = [self.low, self.high, "log" if self.log else "linear"] if self.choices is None else list(self.choices)
        return [*ends, None] if self.optional else ends


@dataclass(frozen=True, slots=True)
class TuneSpace:
    """`left` are parameters without a range, which stay as they are."""

    policy: str
    parameters: tuple[TunedParameter, ...]
    left: tuple[str, ...]

    @classmethod
    def read(cls, policy: str, asked: Sequence[str], base_dir: Path) -> Self:
        """`asked` has names, or name=low..high; empty: all that have a range. Raises UsageError."""
        known = parameters(load_policy.policy_class(policy, base_dir))
        if asked:
            chosen = [_asked(policy, text, known) for text in asked]
            names = [one.name for one in chosen]
            for name in names:
                if names.count(name) > 1:
                    raise UsageError(f"--params {name}: it is there twice")
            return cls(policy, tuple(chosen), ())
        found = {name: _of_field(one) for name, one in known.items()}
        tuned = tuple(one for one in found.values() if one is not None)
        left = tuple(name for name, one in found.items() if one is None)
        if not tuned:
            why = f"{', '.join(left)} has no range: {_remedy(left[0])}" if left else "it has no parameters"
            raise UsageError(f"--policy {policy}: there is nothing to tune: {why}")
        return cls(policy, tuned, left)

    def untuned(self, experiment: Experiment) -> dict[str, Any]:
        """The values that the file gives, else the policy's own."""
        own = given_parameters(experiment.policy, self.policy)
        known = parameters(load_policy.policy_class(self.policy, experiment.base_dir))
        values = {one.name: own.get(one.name, known[one.name].default) for one in self.parameters}
        needed = [name for name, value in values.items() if value is MISSING]
        if needed:
            raise UsageError(f"policy {self.policy} has no default for {needed[0]}: give it a value in the file, to compare with")
        return {name: msgspec.convert(value, known[name].hint) for name, value in values.items()}

    def with_(self, experiment: Experiment, values: Mapping[str, Any]) -> Experiment:
        """Where the file's policy names the one that is tuned, that has these values; else the whole policy is the one that is tuned."""
        return experiment.with_(policy=placed(experiment.policy, self.policy, values))


def placed(said: Any, policy: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """What a file would say in place of the policy that it has."""
    if isinstance(said, Mapping) and "name" not in said and policy in map(_name, said.values()):
        return {hook: {"name": policy, **_own(one), **values} if _name(one) == policy else one for hook, one in said.items()}
    return {"name": policy, **given_parameters(said, policy), **values}


def given_parameters(said: Any, policy: str) -> dict[str, Any]:
    """Those that a file's policy gives to the one named `policy`. Raises UsageError where it has that twice, and not alike."""
    members = [said] if isinstance(said, str) or "name" in said else list(said.values())
    found = [_own(one) for one in members if _name(one) == policy]
    if any(one != found[0] for one in found[1:]):
        raise UsageError(f"--policy {policy}: the file has it twice, with different parameters; tune them in files of their own")
    return found[0] if found else {}


def named_policy(experiment: Experiment) -> str:
    """The one of the file, for who asks for none. Raises UsageError where there are several."""
    said = experiment.policy
    members = [said] if isinstance(said, str) or "name" in said else [said[hook] for hook in HOOKS if hook in said]
    names = list(dict.fromkeys(map(_name, members)))
    if len(names) != 1:
        raise UsageError(f"the file's policy is made of {', '.join(names)}: say with --policy which one to tune")
    return names[0]


def _name(said: Any) -> str:
    return said if isinstance(said, str) else str(said["name"])


def _own(said: Any) -> dict[str, Any]:
    return {} if isinstance(said, str) else {key: value for key, value in said.items() if key != "name"}


def _of_field(one: Parameter) -> TunedParameter | None:
    """None where nothing says between which values."""
    if one.choices is not None:
        return TunedParameter(one.name, choices=one.choices, optional=one.optional)
    if one.bounds is None or one.bounds.searched is None or one.kind not in (int, float):
        return None
    low, high = one.bounds.searched
    return TunedParameter(one.name, low, high, one.bounds.log, one.kind is int, optional=one.optional)


def _asked(policy: str, text: str, known: Mapping[str, Parameter]) -> TunedParameter:
    name, equals, ends = (part.strip() for part in text.partition("="))
    if name not in known:
        near = get_close_matches(name, list(known), n=2, cutoff=0.5)
        hint = f" (did you mean {' or '.join(near)}?)" if near else ""
        raise UsageError(f"--params {text}: policy {policy} has no parameter {name!r}{hint}; it has {', '.join(known) or 'none'}")
    parameter = known[name]
    if not equals:
        own = _of_field(parameter)
        if own is None:
            raise UsageError(f"--params {text}: nothing says between which values; {_remedy(name)}")
        return own
    if parameter.kind not in (int, float):
        raise UsageError(f"--params {text}: {name} is no number, so that it has no ends; write --params {name}")
    low, high = _ends(text, ends, parameter)
    bounds = parameter.bounds
    return TunedParameter(name, low, high, bounds is not None and bounds.log and low > 0, parameter.kind is int)


def _ends(text: str, ends: str, parameter: Parameter) -> tuple[float, float]:
    low, dots, high = ends.partition("..")
    try:
        if not dots:
            raise ValueError
        found = (parameter.kind(low), parameter.kind(high))
    except ValueError:
        kind = "whole numbers" if parameter.kind is int else "numbers"
        raise UsageError(f"--params {text}: write {parameter.name}=LOW..HIGH, both {kind}") from None
    if not found[0] < found[1]:
        raise UsageError(f"--params {text}: {low} is not below {high}")
    for end in found:
        try:
            parameter.check(end)
        except UsageError as error:
            raise UsageError(f"--params {text}: {error}") from None
    return found


def _remedy(name: str) -> str:
    return f"give --params {name}=LOW..HIGH, or annotate the field, {name}: Annotated[float, Range(ge=LOW, le=HIGH)]"
