"""The experiment file of a cluster that other systems' commands start."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pdlab.experiment.deployment import Deployment
from pdlab.experiment.experiment import Experiment
from pdlab.experiment.imports.checks import one_machine, registry_of
from pdlab.experiment.imports.launches import LaunchReading
from pdlab.experiment.imports.programs import Dropped, Launch
from pdlab.experiment.imports.shell import ScriptMistake

ENGINE = (
    *("block_tokens", "max_batch_tokens", "max_seqs", "prefix_cache", "kv_cache_dtype", "kv_blocks", "hbm_utilization", "max_model_len"),
    "speculation",
)
TRANSFERS: dict[str, dict[str, str]] = {
    "push_layer": {"mode": "push", "granularity": "layer"},
    "push_chunk": {"mode": "push", "granularity": "chunk"},
    "pull": {"mode": "pull"},
}
FORMATS = ("dtype", "quantization")
LIMITS = ("request_timeout_s", "max_in_flight", "lease_s", "suspect_s", "max_attempts")
WORKLOAD = {"source": "azure-conv-2023", "requests": 2000}


@dataclass(frozen=True, slots=True)
class Instead:
    """What the caller wants in place of what the commands say. With `hardware` the file can be simulated, too. `folder` is where the file
    will lie: paths in it are relative to that."""

    model: str = ""
    device: str = ""
    hardware: str = ""
    folder: Path = Path()


@dataclass(frozen=True, slots=True)
class Row:
    """An instance of the file: whose launch it comes from, and its name there."""

    name: str
    role: str
    launch: Launch


def mapping_of(reading: LaunchReading, instead: Instead) -> tuple[dict[str, Any], list[Row]]:
    """The file, and its instances in the order of the commands. What it cannot hold goes to `reading.dropped`, what it leaves out to
    `reading.notes`. Raises UsageError where the whole cannot be."""
    instances = reading.instances
    engines = [_engine(reading, one) for one in instances]
    common = {key: value for key, value in (engines[0] if engines else {}).items() if all(one.get(key) == value for one in engines)}
    rows = [
        _row(reading, one, {k: v for k, v in own.items() if k not in common}, instead) for one, own in zip(instances, engines, strict=True)
    ]
    named = list(_named(rows, instances))
    written: dict[str, Any] = {"model": model_of(reading, instead)}
    written |= {key: value for key in FORMATS if (value := _first(instances, key)) is not None}
    written |= {"registry": url} if (url := registry(reading)) else {}
    written["cluster"] = _cluster(reading, rows)
    written["engine"] = common
    written["transfer"] = _transfer(reading)
    written["policy"] = _policy(reading)
    everybody = [*instances, *reading.of("router")]
    written["slo"] = {key: value for key in ("ttft_s", "tpot_s") if (value := _first(everybody, f"slo_{key}")) is not None}
    written["limits"] = {key: value for key in LIMITS if (value := _first(everybody, key)) is not None}
    written |= {"seed": value} if (value := _first(instances, "seed")) is not None else {}
    if not _whole(named):
        written["cluster"].pop("instances")
        text = "these commands start no whole cluster: cluster.instances is left out, and each serve command says its role"
        reading.notes.append(ScriptMistake(0, text))
    elif instead.hardware:
        written["workload"] = {**WORKLOAD, "rate": 1.0}
    kept = {key: value for key, value in written.items() if value not in ({}, None)}
    (Experiment if "workload" in kept else Deployment).parse({"name": "imported", **kept}, "import")
    return kept, named


def as_yaml(written: Mapping[str, Any], source: str, systems: Sequence[str]) -> str:
    head = f"# Imported from {source}: {', '.join(systems)}. docs/guides/import.md says what becomes of each flag.\n"
    return head + yaml.safe_dump(dict(written), sort_keys=False, width=120, allow_unicode=True)


def registry(reading: LaunchReading) -> str:
    """Where all meet; empty where nobody says."""
    return next((url for one in (*reading.of("router"), *reading.instances) if (url := registry_of(one))), "")


def model_of(reading: LaunchReading, instead: Instead) -> str:
    found = _first(reading.instances, "model")
    model = instead.model or (str(found).rstrip("/") if found else "smollm2-135m")
    here = not Path(model).is_absolute() and Path(model).exists()
    return os.path.relpath(model, instead.folder) if here else model


def starts_all(reading: LaunchReading, count: int) -> bool:
    """Does one command start all instances? They are on one machine, and name nowhere to meet."""
    if any(one.number("nodes") > 1 for one in reading.instances):
        return False
    return not registry(reading) and (count > 1 or bool(reading.of("cluster"))) and (one_machine(reading) or bool(reading.of("cluster")))


def one_device(found: Launch) -> str:
    """:N where CUDA_VISIBLE_DEVICES leaves it the one N, else nothing."""
    visible = found.get("visible")
    single = isinstance(visible, tuple) and len(visible) == 1 and str(visible[0]).isdigit() and found.program.kind != "cluster"
    return f":{visible[0]}" if single and isinstance(visible, tuple) else ""


def _whole(rows: Sequence[Row]) -> bool:
    roles = {row.role for row in rows}
    return "mixed" in roles or {"prefill", "decode"} <= roles


# ---------------------------------------------------------------- its parts


def _first(launches: Sequence[Launch], setting: str) -> object:
    return next((value for one in launches if (value := one.get(setting)) is not None), None)


def _engine(reading: LaunchReading, found: Launch) -> dict[str, Any]:
    own = {key: value for key in ENGINE if (value := found.get(key)) is not None}
    chunk = found.number("chunk")
    if found.get("chunked") is False or chunk < 0:
        own["batching"] = "prefill_first"
    elif chunk > 0:
        own["max_batch_tokens"] = chunk
    if found.number("recv_interval") > 1:
        if (found.text("role") or "mixed") == "mixed":
            own["batching"] = {"name": "delayed", "polled": True, "prompts_first": True, "steps": found.number("recv_interval")}
        else:
            why = "delayed, which it is elsewhere, holds prompts back while others decode: nobody does both here"
            reading.dropped.append(
                Dropped(found.line_of("recv_interval"), found.flag_of("recv_interval"), found.text("recv_interval"), why)
            )
    if found.number("kv_tokens"):
        own["kv_blocks"] = max(1, found.number("kv_tokens") // (found.number("block_tokens") or 16))
    return own


def _row(reading: LaunchReading, found: Launch, engine: dict[str, Any], instead: Instead) -> dict[str, Any]:
    device = instead.device or found.text("device") or "cuda"
    if device == "cuda" and starts_all(reading, len(reading.instances)):
        device += one_device(found)
    row: dict[str, Any] = {"role": found.text("role") or "mixed", "count": found.number("count") or 1, "device": device}
    if found.program.kind == "cluster":
        row |= _of_cluster(found)
    tp = found.number("tp") or 1
    if tp > 1 and instead.device == "cpu":
        reading.dropped.append(Dropped(found.line_of("tp"), found.flag_of("tp"), str(tp), "on a CPU one rank has all threads: tp is 1"))
    elif tp > 1:
        row |= {"tp": tp, **({"ep": tp} if found.get("experts_whole") else {})}
    if found.number("nodes") > 1 and instead.device == "cpu":
        nodes = found.text("nodes")
        reading.dropped.append(Dropped(found.line_of("nodes"), found.flag_of("nodes"), nodes, "on a CPU there is one rank, on one node"))
    return {**row, **({"hardware": instead.hardware} if instead.hardware else {}), **({"engine": engine} if engine else {})}


def _of_cluster(found: Launch) -> dict[str, Any]:
    count = found.number("instances")
    if found.get("disaggregated") is not True:
        return {"role": found.text("role") or "mixed", "count": count}
    prefill = found.number("prefill") or _by_ratio(found.text("ratio"), count)
    return {"role": "auto", "count": count, "prefill": prefill}


def _by_ratio(text: str, count: int) -> int:
    """Prefill instances of `count`, as near to P:D as whole ones come; 1 without a ratio."""
    parts = [int(part) for part in text.split(":") if part.strip().isdigit()]
    if len(parts) != 2 or not sum(parts):
        return 1
    return min(max(round(count * parts[0] / sum(parts)), 1), count - 1)


def _named(rows: Sequence[Mapping[str, Any]], launches: Sequence[Launch]) -> Iterator[Row]:
    """As the file's placements are named."""
    counted: dict[str, int] = {}
    for row, one in zip(rows, launches, strict=True):
        prefill = row.get("prefill", 0)
        roles = [row["role"]] * row["count"] if row["role"] != "auto" else ["prefill"] * prefill + ["decode"] * (row["count"] - prefill)
        for role in roles:
            counted[role] = counted.get(role, -1) + 1
            yield Row(f"{role}-{counted[role]}", role, one)


def _cluster(reading: LaunchReading, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {"instances": list(rows)}
    if (period_s := _first(reading.instances, "report_s")) is not None:
        found["reports"] = {"period_s": period_s}
    for one in reading.of("cluster"):
        if one.get("scaling") is True:
            why = "pdlab's llumnix does not scale: cluster.autoscale is for a policy whose resize does"
            for name in ("scaling", "min_instances", "max_instances"):
                if name in one.settings:
                    reading.dropped.append(Dropped(one.line_of(name), one.flag_of(name), one.text(name), why))
    return found


def _transfer(reading: LaunchReading) -> dict[str, Any]:
    everybody = [*reading.instances, *reading.of("router")]
    found: dict[str, Any] = dict(TRANSFERS.get(str(_first(reading.instances, "transfer")), {}))
    for key in ("first_token", "response_path"):
        if (value := _first(everybody, key)) is not None:
            found[key] = value
    return found


def _policy(reading: LaunchReading) -> Any:
    routers = reading.of("router")
    for one in reading.of("cluster"):
        return _llumnix(one)
    hooks = {hook: _first(routers, hook) or _first(routers, "policy") for hook in ("dispatch", "handoff")}
    if any(_first(routers, hook) for hook in hooks):
        return hooks
    return _first(routers, "policy") or _first(reading.instances, "policy")


def _llumnix(found: Launch) -> Any:
    parameters = {key: value for key in ("migrate_out_threshold", "pairing", "request_order") if (value := found.get(key)) is not None}
    if found.get("defrag") is True:
        parameters["pairing"] = "defrag"
    dispatch, whole = str(found.get("dispatch") or "llumnix"), {"name": "llumnix", **parameters} if parameters else "llumnix"
    if found.get("migration") is False and found.get("disaggregated") is not True:
        return {"dispatch": dispatch, "handoff": dispatch}
    return whole if dispatch == "llumnix" else {"dispatch": dispatch, "handoff": whole, "migrate": whole}
