"""What a result is kept by: a hash of all that decides it.

That is the experiment with its defaults, the files that it names, the policy's source, and pdlab's own. Where its folder lies and what it
is called decide nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pdlab
from pdlab.experiment.experiment import Experiment
from pdlab.policies import load as load_policy

_DECIDES_NOTHING = ("name", "base_dir")
_ROOMS = ("core", "policies", "batching", "cost", "workload", "experiment", "results", "sim")
_DIGITS = 16


class RunHashes:
    """Of the runs of a sweep: each file and each policy is read once."""

    def __init__(self) -> None:
        self.policies: dict[str, str] = {}
        self.files: dict[Path, str | None] = {}

    def of(self, experiment: Experiment) -> str:
        plain = experiment.resolved()
        kept = {key: value for key, value in plain.items() if key not in _DECIDES_NOTHING}
        named = {text: digest for text in texts(kept) if (digest := self._file(experiment.base_dir / text)) is not None}
        whole = {"experiment": kept, "files": named, "policy": self.policy(experiment), "pdlab": code_hash()}
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:_DIGITS]

    def policy(self, experiment: Experiment) -> str:
        """The hash of its source, as `simulate` has it in `run.policy_hash`."""
        said = json.dumps([experiment.policy, str(experiment.base_dir)], sort_keys=True)
        if said not in self.policies:
            self.policies[said] = load_policy.source_hash(load_policy.build(experiment.policy, experiment.base_dir))
        return self.policies[said]

    def _file(self, path: Path) -> str | None:
        if path not in self.files:
            self.files[path] = _file_hash(path)
        return self.files[path]


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


def _file_hash(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError):
        return None


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
