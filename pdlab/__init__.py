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
    from pdlab.core.policy import Borrow, Policy, Range, Reject
    from pdlab.core.types import Request, Role, Scale, UsageError
    from pdlab.core.view import Cluster, Instance
    from pdlab.experiment.experiment import Experiment
    from pdlab.report.result import Result
    from pdlab.sim import simulate

__version__ = "0.1.0"

__all__ = [
    "Borrow",
    "Cluster",
    "Experiment",
    "Instance",
    "Policy",
    "Range",
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
    "Borrow": "pdlab.core.policy",
    "Cluster": "pdlab.core.view",
    "Experiment": "pdlab.experiment.experiment",
    "Instance": "pdlab.core.view",
    "Policy": "pdlab.core.policy",
    "Range": "pdlab.core.policy",
    "Reject": "pdlab.core.policy",
    "Request": "pdlab.core.types",
    "Result": "pdlab.report.result",
    "Role": "pdlab.core.types",
    "Scale": "pdlab.core.types",
    "UsageError": "pdlab.core.types",
    "simulate": "pdlab.sim",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
