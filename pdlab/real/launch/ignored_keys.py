"""Which keys of the file a server does not use, and why. Nothing that a file says is passed over without a word."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pdlab.experiment.deployment import Deployment
from pdlab.experiment.fields import ignored_line
from pdlab.real.launch.asked import Asked

OF_A_CLUSTER = ("cluster.instances", "cluster.reports", "cluster.autoscale", "transfer", "policy", "slo", "limits")
OF_AN_ENGINE = ("device", "dtype", "quantization", "engine")


def ignored(asked: Asked) -> str:
    """A line; empty where all is used."""
    if asked.deployment is None:
        return ""
    deployment, said = asked.deployment, asked.deployment.model_dump(mode="json", exclude_unset=True)
    because: dict[str, list[str]] = {"they are the simulator's": list(deployment.unread)}
    if asked.alone:
        used = ("cluster.instances",) if asked.placed is not None else ()
        because["one server is no cluster"] = [path for path in OF_A_CLUSTER if path not in used and _has(said, path)]
    if asked.engine == "vllm":
        because["the server at --upstream has its own"] = [path for path in OF_AN_ENGINE if _has(said, path)]
    if asked.role == "all":
        because["--role all keeps its own in memory"] = [path for path in ("registry",) if _has(said, path)]
    if asked.engine == "pdlab" and asked.role != "router" and set(_devices(asked, deployment)) == {"cpu"}:
        because["engine.kv_blocks says it where there is only a CPU"] = list(_utilization(said))
    return ignored_line("serve", because)


def _devices(asked: Asked, deployment: Deployment) -> Iterator[str]:
    if device := asked.given.get("device"):
        yield str(device)
    elif asked.role == "all":
        yield from (one.device for one in deployment.placements())
    else:
        yield asked.placed.device if asked.placed is not None else deployment.device


def _utilization(said: dict[str, Any]) -> Iterator[str]:
    if _has(said, "engine.hbm_utilization"):
        yield "engine.hbm_utilization"
    if any(_has(row, "engine.hbm_utilization") for row in said.get("cluster", {}).get("instances", ())):
        yield "cluster.instances.engine.hbm_utilization"


def _has(said: Any, path: str) -> bool:
    for key in path.split("."):
        if not isinstance(said, dict) or said.get(key) is None:
            return False
        said = said[key]
    return True
