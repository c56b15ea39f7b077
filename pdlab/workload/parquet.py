"""Rows of a Parquet file, a batch at a time."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date, datetime
from decimal import Decimal
from typing import Any

from pdlab.core.types import UsageError
from pdlab.workload.text import TextFile

_BATCH_ROWS = 10_000


def parquet_rows(file: TextFile) -> Iterator[dict[str, Any]]:
    """One object a row; dates as text, as other files have them. Raises UsageError where the file is damaged."""
    import pyarrow as pa  # a third of a small simulation's memory, and few traces are Parquet files
    import pyarrow.parquet as pq

    file.counted, file.line = "row", 0
    try:
        with pq.ParquetFile(file.path) as rows:
            for batch in rows.iter_batches(_BATCH_ROWS):
                for row in batch.to_pylist():
                    file.line += 1
                    yield {name: _plain(value) for name, value in row.items()}
    except (pa.ArrowException, OSError) as error:
        raise UsageError(f"{file.path}: from about row {file.line + 1} on, damaged: {str(error).splitlines()[0]}") from None


def _plain(value: Any) -> Any:
    if isinstance(value, datetime | date):
        return value.isoformat()
    return float(value) if isinstance(value, Decimal) else value
