"""The lab: experiments over HTTP, kept in a database, run by a pool of processes.

from pdlab.lab import Client

Client("http://127.0.0.1:8800").submit("experiments/quickstart.yaml").wait().summary
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pdlab.lab.client import Client

__all__ = ["Client"]


def __getattr__(name: str) -> object:
    if name == "Client":
        from pdlab.lab.client import Client

        return Client
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
