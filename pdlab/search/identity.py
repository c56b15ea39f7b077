"""What a result is kept by: a hash of all that decides it.

That is the experiment with its defaults, the files that it names, the policy's source, and pdlab's own. Where its folder lies and what it
is called decide nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pdlab
from pdlab.core.types import UsageError
from pdlab.experiment.experiment import Experiment
from pdlab.policies import load as load_policy

_DECIDES_NOTHING = ("name", "base_dir", "plan")
_ROOMS = ("core", "policies", "batching", "cost", "workload", "experiment", "results", "sim")
_DIGITS = 16


class RunHashes:
    """Of the runs of a sweep: each file and each policy is read once."""

    def __init__(self) -> None:
        self.policies: dict[str, str] = {}
        self.files: dict[tuple[str, Path], tuple[str, str] | None] = {}

    def of(self, experiment: Experiment) -> str:
        plain = experiment.resolved()
        kept = {key: value for key, value in plain.items() if key not in _DECIDES_NOTHING}
        named = dict(file for text in texts(kept) if (file := self._file(text, experiment.base_dir)) is not None)
        whole = {"experiment": kept, "files": named, "policy": self.policy(experiment), "pdlab": code_hash()}
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:_DIGITS]

    def policy(self, experiment: Experiment) -> str:
        """The hash of its source, as `simulate` has it in `run.policy_hash`."""
        said = json.dumps([experiment.policy, str(experiment.base_dir)], sort_keys=True)
        if said not in self.policies:
            self.policies[said] = load_policy.source_hash(load_policy.build(experiment.policy, experiment.base_dir))
        return self.policies[said]

    def _file(self, text: str, base_dir: Path) -> tuple[str, str] | None:
        """The name and the hash of the file that a value names; None where it names none."""
        if (text, base_dir) not in self.files:
            name = named_file(text, base_dir)
            self.files[text, base_dir] = None if name is None else (name, _file_hash(base_dir / name))
        return self.files[text, base_dir]


def named_file(text: str, base_dir: Path) -> str | None:
    """The path, relative to `base_dir`, of the file that a value of an experiment names: itself, a model's folder, `policy.py:Class`."""
    names = (text, f"{text}/config.json", f"{text.rpartition('.py:')[0]}.py")
    return next((name for name in names if _is_file(base_dir / name)), None)


def texts(value: Any) -> Iterator[str]:
    """Every text within a value, any of which may be a path."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from texts(inner)


def first_difference(there: Mapping[str, Any], here: Mapping[str, Any], varied: Sequence[str] = ()) -> str | None:
    """The first value that two resolved experiments do not have in common, in words; those below the paths of `varied` may differ."""
    old, new = dict(_leaves(there)), dict(_leaves(here))
    for path in dict.fromkeys([*new, *old]):
        free = any(f"{path}.".startswith(f"{key}.") for key in varied)
        if not free and old.get(path) != new.get(path):
            return f"{path} is {_shown(old, path)} there, {_shown(new, path)} here"
    return None


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    inner = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    if not inner:
        yield path, value
    for key, part in inner:
        yield from _leaves(part, f"{path}.{key}" if path else str(key))


def _shown(leaves: Mapping[str, Any], path: str) -> str:
    return json.dumps(leaves[path]) if path in leaves else "not said"


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # no text that could be a path
        return False


def _file_hash(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None


@cache
def code_hash() -> str:
    """Of pdlab's version, and of the source and tables behind a simulation's figures."""
    digest = hashlib.sha256(pdlab.__version__.encode())
    root = Path(pdlab.__file__).parent
    for room in _ROOMS:
        for path in sorted((root / room).rglob("*")):
            if path.is_file() and path.suffix not in (".pyc", ".pyo"):
                digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()
