"""Which world uses which key of the experiment file, as docs/reference/experiment-file.md shows it: `pdlab schema --table`."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import BaseModel

from pdlab.experiment.experiment import Experiment
from pdlab.experiment.fields import Use, nested, use_of

HEAD = "| key | `pdlab sim` | `pdlab serve` |\n|---|---|---|"


def table() -> str:
    """In Markdown: a row for the keys of a mapping that are used alike."""
    rows: dict[tuple[str, Use], list[str]] = {}
    for where, key, use in keys(Experiment):
        rows.setdefault((where, use), []).append(f"`{key}`")
    lines = []
    for (where, use), names in rows.items():
        before = f"`{where}`: " if where else ""
        lines.append(f"| {before}{', '.join(names)} | {use.sim or 'no'} | {use.serve or 'no'} |")
    return "\n".join([HEAD, *lines])


def keys(model: type[BaseModel], where: str = "") -> Iterator[tuple[str, str, Use]]:
    """Every key: the mapping it is in, its name, and its use. What one world alone uses is one key, however much there is in it."""
    inner = []
    for key, field in model.model_fields.items():
        use, below = use_of(field), nested(field)
        if below is not None and use == Use():
            inner.append((key, below))
        else:
            yield where, key, use
    for key, below in inner:
        yield from keys(below, f"{where}.{key}" if where else key)
