"""Accelerators in a file of their own: one, or several by name. They take the place of what an experiment's rows name.

my-h20: {like: h20, hbm_gib: 141, hbm_gbytes_per_s: 4800}
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pdlab.core.file_kinds import ACCELERATORS
from pdlab.core.types import UsageError
from pdlab.cost.accelerator import AcceleratorSpec
from pdlab.cost.catalogue import hardware
from pdlab.experiment.mistakes import mistakes
from pdlab.experiment.yaml import read_yaml

Written = dict[str, dict[str, Any]]  # by name, as an experiment's row would say it
ENDINGS = (".yaml", ".yml")


def read_accelerators(path: Path) -> Written:
    """Those in a file; one without a name above it has the file's. Raises UsageError with a line for each mistake."""
    content = read_yaml(path, ACCELERATORS)
    several = bool(content) and all(isinstance(figures, Mapping) for figures in content.values())
    named = content if several else {str(content.get("name") or path.stem): content}
    found: Written = {}
    for name, figures in named.items():
        where = f"{path}: {name}" if several else str(path)
        try:
            spec = AcceleratorSpec.model_validate({"name": str(name), **figures})
            hardware(spec)
        except ValidationError as error:
            raise UsageError("\n".join(f"{where}: {line}" for line in mistakes(error, AcceleratorSpec))) from None
        except UsageError as error:
            raise UsageError(f"{where}: {error}") from None
        found[str(name)] = spec.model_dump(exclude_none=True)
    return found


def with_accelerators(mapping: dict[str, Any], folder: Path, known: Written) -> dict[str, Any]:
    """An experiment's mapping, in which rows have the accelerators of `known` that they name, and those in files of their own, relative to
    `folder`. Raises UsageError."""
    cluster = mapping.get("cluster")
    rows = cluster.get("instances") if isinstance(cluster, Mapping) else None
    if not isinstance(cluster, Mapping) or not isinstance(rows, list):
        return mapping
    return {**mapping, "cluster": {**cluster, "instances": [_with(row, folder, known) for row in rows]}}


def _with(row: Any, folder: Path, known: Written) -> Any:
    named = row.get("hardware") if isinstance(row, Mapping) else None
    if not isinstance(named, str):
        return row
    if named in known:
        return {**row, "hardware": known[named]}
    if not named.endswith(ENDINGS):
        return row
    there = read_accelerators(folder / named)
    if len(there) > 1:
        raise UsageError(f"{folder / named} has {', '.join(there)}: give it as --hardware-file, and one of these names as hardware")
    return {**row, "hardware": next(iter(there.values()))}
