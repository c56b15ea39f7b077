"""pdlab: how should prefill and decode be split over my machines, and which policy should run them?

    from pdlab import Experiment, simulate

    result = simulate(Experiment.load("experiments/quickstart.yaml"))
    result.summary, result.requests, result.plot()

Names are imported when first used (PEP 562), so that a policy file or `pdlab --help` does not wait for pandas.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pdlab.cluster import Cluster, Instance
    from pdlab.experiment.experiment import Experiment
    from pdlab.policy import Policy, Reject
    from pdlab.result import Result
    from pdlab.sim import simulate
    from pdlab.types import Request, Role, Scale, UsageError

__version__ = "0.1.0"

__all__ = [
    "Cluster",
    "Experiment",
    "Instance",
    "Policy",
    "Reject",
    "Request",
    "Result",
    "Role",
    "Scale",
    "UsageError",
    "__version__",
    "simulate",
]

_HOMES = {
    "Cluster": "pdlab.cluster",
    "Experiment": "pdlab.experiment.experiment",
    "Instance": "pdlab.cluster",
    "Policy": "pdlab.policy",
    "Reject": "pdlab.policy",
    "Request": "pdlab.types",
    "Result": "pdlab.result",
    "Role": "pdlab.types",
    "Scale": "pdlab.types",
    "UsageError": "pdlab.types",
    "simulate": "pdlab.sim",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
