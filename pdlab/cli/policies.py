"""`pdlab policies`."""

from __future__ import annotations

import sys
from pathlib import Path

from pdlab.cli.listing import first_sentence, plain
from pdlab.cli.shared import out
from pdlab.core.policy import HOOKS, Policy
from pdlab.policies import load as load_policy


def policies() -> None:
    """The built-in policies: which hooks each one answers, and how it decides."""
    table = plain("policy", "decides", "how")
    for name in load_policy.names():
        cls = load_policy.policy_class(name, Path())
        hooks = [hook for hook in HOOKS if getattr(cls, hook) is not getattr(Policy, hook)]
        table.add_row(name, ", ".join(hooks), first_sentence(sys.modules[cls.__module__].__doc__ or ""))
    out.print(table)
