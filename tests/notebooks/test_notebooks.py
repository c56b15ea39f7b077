"""The notebooks run from top to bottom in a fresh kernel, as they do for their readers, and show what is stored of them.

`python -m tests.notebooks.record` stores it anew.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from pdlab.results.comparison_stored import checks, load_checks, stored
from tests.notebooks.record import FOLDER, PATHS, executed, read, shown

STORED = FOLDER / "two_worlds"  # runs of `pdlab validate`
NOTEBOOKS = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


@NOTEBOOKS
def test_every_cell_shows_what_is_stored(path: Path, tmp_path: Path) -> None:
    cells = [cell for cell in executed(path, tmp_path).cells if cell.cell_type == "code"]
    kept = [cell for cell in read(path).cells if cell.cell_type == "code"]
    for cell, before in zip(cells, kept, strict=True):
        assert shown(cell) == shown(before), f"{cell.id}: if that is right, python -m tests.notebooks.record"
        assert cell.execution_count == before.execution_count
    assert not [output.text for cell in cells for output in cell.outputs if output.get("name") == "stderr"], "a reader sees no warnings"
    assert not list(tmp_path.glob("pdlab-*")), "what a notebook writes goes with its kernel"


@NOTEBOOKS
def test_a_reader_sees_tables_and_pictures(path: Path) -> None:
    notebook = read(path)
    assert set(notebook.metadata) == {"kernelspec", "language_info"} and set(notebook.metadata.language_info) == {"name"}
    assert not any(cell.metadata for cell in notebook.cells)
    kinds = [kind for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs for kind in output.get("data", {})]
    assert "image/png" in kinds and "text/html" in kinds
    assert "\x1b" not in path.read_text(encoding="utf-8") and "\\u001b" not in path.read_text(encoding="utf-8"), "a terminal's colours"
    assert path.stat().st_size < 600_000


def test_the_stored_checks_are_those_of_the_stored_results() -> None:
    again = {(c.run, c.policy, c.key): c for run, comparison in stored(STORED).items() for c in checks(run, comparison)}
    kept = {(c.run, c.policy, c.key): c for c in load_checks(STORED)}
    assert again.keys() == kept.keys() and kept
    for key, check in kept.items():
        found = again[key]
        assert found.holds == check.holds, key
        assert (found.simulated, found.measured) == pytest.approx((check.simulated, check.measured), nan_ok=True), key
    sizes = {file.name: file.stat().st_size for file in STORED.iterdir()}
    assert sizes.keys() == {"manifest.json", "requests.parquet"}
    assert sizes["requests.parquet"] <= 300_000
