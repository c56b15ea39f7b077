"""How an instance forms its next batch. One strategy a file; the file's name is its name in YAML."""

from __future__ import annotations

import importlib
import pkgutil

from pdlab.core.scheduler import Batching
from pdlab.core.types import UsageError

CHUNKED = ("chunked", "slide_batching")  # a step has at most `max_batch_tokens` of a prompt


def names() -> list[str]:
    return sorted(m.name for m in pkgutil.iter_modules(__path__))


def load(name: str) -> Batching:
    """The strategy in `pdlab/batching/<name>.py`: the class named like the file."""
    if name not in names():
        raise UsageError(f"engine.batching: unknown {name!r}; there are {', '.join(names())}")
    strategy: Batching = getattr(importlib.import_module(f"pdlab.batching.{name}"), name.title().replace("_", ""))()
    return strategy
