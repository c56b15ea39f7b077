"""The notebooks run from top to bottom in a fresh kernel, as they do for their readers, and are stored without outputs."""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
import pytest
from ipykernel.kernelspec import write_kernel_spec
from nbclient import NotebookClient
from nbformat import NotebookNode

from pdlab.results.comparison_stored import checks, load_checks, stored

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
STORED = FOLDER / "two_worlds"  # results of `pdlab validate`
NOTEBOOKS = pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)


def read(path: Path) -> NotebookNode:
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    return notebook


@pytest.fixture
def own_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a kernel that is the Python of these tests, without the user's settings; its files stay in `tmp_path`."""
    spec = Path(write_kernel_spec(tmp_path / "kernels" / "tests"))
    assert sys.executable in (spec / "kernel.json").read_text(encoding="utf-8")
    for variable in ("JUPYTER_PATH", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "TMPDIR"):
        monkeypatch.setenv(variable, str(tmp_path))
    return spec.name


@NOTEBOOKS
def test_every_cell_runs(path: Path, own_kernel: str, tmp_path: Path) -> None:
    notebook = read(path)
    if any(STORED.name in cell.source for cell in notebook.cells if cell.cell_type == "code") and not STORED.is_dir():
        pytest.skip(f"{STORED.name}/, the results that it reads, are not stored yet")
    where = {"metadata": {"path": str(FOLDER)}}
    NotebookClient(notebook, kernel_name=own_kernel, timeout=300, startup_timeout=300, resources=where).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells)
    assert not [output.text for cell in cells for output in cell.outputs if output.get("name") == "stderr"], "a reader sees no warnings"
    assert not list(tmp_path.glob("pdlab-*")), "what a notebook writes goes with its kernel"


@NOTEBOOKS
def test_no_output_is_stored(path: Path) -> None:
    notebook = read(path)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    for cell in notebook.cells:
        assert not cell.metadata, cell.id
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None, cell.id


@pytest.mark.skipif(not STORED.is_dir(), reason=f"{STORED.name}/ is not stored yet")
def test_the_stored_checks_are_those_of_the_stored_results() -> None:
    again = {(c.run, c.policy, c.key): c for run, comparison in stored(STORED).items() for c in checks(run, comparison)}
    kept = {(c.run, c.policy, c.key): c for c in load_checks(STORED / "checks.json")}
    assert again.keys() == kept.keys() and kept
    for key, check in kept.items():
        found = again[key]
        assert found.holds == check.holds, key
        assert (found.simulated, found.measured) == pytest.approx((check.simulated, check.measured), nan_ok=True), key
    assert sum(file.stat().st_size for file in STORED.rglob("*") if file.is_file()) < 3_000_000
