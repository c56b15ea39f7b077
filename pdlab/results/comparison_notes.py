"""What makes a comparison doubtful: other requests, another experiment, another model, and what the runs warn of themselves."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pdlab.core.types import UsageError
from pdlab.cost import hardware
from pdlab.results.run import Run

_SHOWN = 4  # keys in which two experiments differ; more are counted
# Not the same in both worlds, or said elsewhere.
_OWN = re.compile(
    r"(name|base_dir|seed|policy|cost|faults|cluster\.(network|reports|detect_s)|cluster\.instances\.\d+\.(hardware|host|nics))(\.|$)"
)


def notes(simulations: Sequence[Run], measured: Sequence[Run]) -> Iterator[str]:
    """One line each, of one policy's runs."""
    simulated = simulations[0]
    for another in simulations[1:]:
        if differing := _differing(_simulated(simulated), _simulated(another)):
            yield f"the simulations are of different experiments: {differing}"
    ours, planned, profiled = _prompts(simulated), _plain(simulated.experiment), _profiled_models(simulated)
    for result in measured:
        theirs = _prompts(result)
        shared = ours.keys() & theirs.keys()
        other = sum(ours[i] != theirs[i] for i in shared)
        if other:
            yield f"{other:,} of {len(shared):,} requests have other prompt lengths in {_place(result)}: not the same workload"
        elif len(ours) != len(theirs):
            yield f"{len(ours):,} requests were simulated, {len(theirs):,} measured in {_place(result)}"
        if result.summary["partial"]:
            yield f"{_place(result)} was stopped early"
        if result.summary["run"].get("seed") != simulated.summary["run"].get("seed"):
            yield f"{_place(result)} has another seed: requests are no pairs"
        if differing := _differing(planned, _plain(result.experiment)):
            yield f"{_place(result)} is of another experiment than the simulation: {differing}"
        served = str(result.summary["run"].get("model") or "")
        for name in profiled if served else ():
            if not _alike(name, served):
                yield f"{_place(result)} was of model {served}, the simulation's profile is of {name}"
    if any(result.summary["partial"] for result in simulations):
        yield "the simulation was stopped early"
    servers = dict.fromkeys(_server(result) for result in measured)
    if len(servers) > 1:
        yield f"the measured runs are of different servers: {', '.join(servers)}"
    yield from _warned(simulated, measured)


def _prompts(result: Run) -> dict[int, float]:
    found = result.records.columns()
    return dict(zip(found["request_id"].astype(int).tolist(), found["prompt_tokens"].tolist(), strict=True))


def _place(result: Run) -> str:
    return f"the run at {result.summary['run'].get('url', 'an unknown address')}"


def _plain(value: Any, path: str = "") -> dict[str, Any]:
    """Every value of an experiment that both worlds must share, by its path."""
    if _OWN.match(path):
        return {}
    parts = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else None
    if parts is None:
        return {path: value}
    return {key: leaf for name, part in parts for key, leaf in _plain(part, f"{path}.{name}" if path else str(name)).items()}


def _simulated(result: Run) -> dict[str, Any]:
    """What simulations must share whose mean is taken: all but the seed and what goes wrong."""
    rows = result.experiment.get("cluster", {}).get("instances", [])
    named = {f"cluster.instances.{number}.hardware": row.get("hardware") for number, row in enumerate(rows)}
    return _plain(result.experiment) | named


def _differing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """As "engine.max_seqs 16, not 32"; empty where nothing differs, or one of them is not known."""
    if not ours or not theirs:
        return ""
    keys = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    words = [f"{key} {theirs.get(key, 'left out')}, not {ours.get(key, 'left out')}" for key in keys[:_SHOWN]]
    return "; ".join([*words, f"and {len(keys) - _SHOWN} more"] if len(keys) > _SHOWN else words)


def _profiled_models(result: Run) -> list[str]:
    """The models with which the simulated instances were measured, as far as their profiles are still where they were."""
    base_dir = Path(result.experiment.get("base_dir", ""))
    names = []
    for row in result.experiment.get("cluster", {}).get("instances", ()):
        try:
            profile = hardware(row["hardware"], base_dir).profile if isinstance(row["hardware"], str) else None
        except UsageError:
            continue
        if profile is not None:
            names.append(profile.model.name)
    return list(dict.fromkeys(names))


def _alike(name: str, other: str) -> bool:
    """Are these the same model's names? A server may tell a path, or leave the number format out."""
    a, b = (re.sub(r"[^a-z0-9]", "", word.rpartition("/")[2].lower()) for word in (name, other))
    return a.startswith(b) or b.startswith(a)


def _server(result: Run) -> str:
    run = result.summary["run"]
    return " ".join(str(run.get(key) or "of unknown " + words) for key, words in (("model", "model"), ("server_version", "version")))


def _warned(simulated: Run, measured: Sequence[Run]) -> Iterator[str]:
    """The runs' own warnings, each once; what all runs of both worlds say is of the workload, and no difference."""
    foretold, runs = simulated.summary["warnings"], [result.summary["warnings"] for result in measured]
    for said in dict.fromkeys([*foretold, *(line for own in runs for line in own)]):
        count = sum(said in own for own in runs)
        if said in foretold and count == len(runs):
            continue
        places = ["the simulation"] if said in foretold else []
        if count:
            places.append("the measured run" if len(runs) == 1 else f"{count} of {len(runs)} measured runs")
        yield f"{said} ({' and '.join(places)})"
