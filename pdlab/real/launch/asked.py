"""What the command line of `pdlab serve` asks for."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pdlab.experiment.cluster import Placement
from pdlab.experiment.deployment import Deployment
from pdlab.real.launch.instance import Listening
from pdlab.real.registry.child_registry import SCHEME


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The command line. `given` are the engine's options; None: not given."""

    role: str
    file: Path | None
    deployment: Deployment | None
    given: Mapping[str, object]
    serving: Listening
    registry: str = ""
    registry_wait_s: float = 0.0
    instance_name: str = ""
    advertise: str = ""
    kv_transport: str = "auto"
    kv_port: int = 0
    engine: str = "pdlab"
    upstream: str = ""
    upstream_api_key: str = ""
    trace_events: Path | None = None
    request_timeout_s: float | None = None  # None: as the file says
    traceback: bool = False
    self_profile: bool = True
    otlp_endpoint: str = ""

    @property
    def name(self) -> str:
        """Of the instance or the router, unique among its peers unless somebody gave two the same."""
        return self.instance_name or re.sub(r"[^A-Za-z0-9._-]", "-", f"{self.role}-{platform.node()}-{os.getpid()}")[:128]

    @property
    def placed(self) -> Placement | None:
        """Which of the file's instances it is: the one of its name, else one of its role. One that was scaled up is like the first of its
        role, or the first at all, as simulated. Raises UsageError where the file leaves it open."""
        if self.deployment is None:
            return None
        if not self.is_child:
            return self.deployment.place_of(self.instance_name, self.role)
        placed = self.deployment.placements()
        like = [one for one in placed if one.name == self.instance_name] or [one for one in placed if one.role == self.role] or placed
        return like[0]

    @property
    def is_child(self) -> bool:
        """Of a `--role all`."""
        return self.registry.startswith(SCHEME)

    @property
    def alone(self) -> bool:
        """A server without a cluster."""
        return self.role == "mixed" and not self.registry
