"""A folder's files, all or none: written beside it, and moved in place when whole."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pdlab.core.types import UsageError


@contextmanager
def staged(directory: Path, remedy: str = "give another directory with --out") -> Iterator[Path]:
    """A folder beside `directory`, on the same file system, which is gone afterwards: whoever fills it moves what is in it. Raises
    UsageError where there is no room or no right to write."""
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{directory.name}.partial-", dir=directory.parent))
    except OSError as error:
        raise UsageError(f"{directory}: cannot write there ({error.strerror}); {remedy}") from None
    try:
        yield aside
    except OSError as error:
        raise UsageError(f"{directory}: cannot write there ({error.strerror}); {remedy}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
