"""`python -m tests.notebooks.record [FILE...]`: runs the notebooks from top to bottom in a fresh kernel, and stores what they show.

What a reader sees is what is stored, so the tests run them again and compare. Pictures are compared by their size: fonts differ.
"""

from __future__ import annotations

import base64
import os
import re
import struct
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
from ipykernel.kernelspec import write_kernel_spec
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
PATHS = sorted(FOLDER.glob("*.ipynb"))
_SEVERAL = ("JUPYTER_PATH", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "TMPDIR")


def read(path: Path) -> NotebookNode:
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    return notebook


@contextmanager
def own_kernel(folder: Path) -> Iterator[str]:
    """The name of a kernel that is this Python, without the user's settings; its files stay in `folder`."""
    spec = Path(write_kernel_spec(folder / "kernels" / "tests"))
    assert sys.executable in (spec / "kernel.json").read_text(encoding="utf-8")
    before = {name: os.environ.get(name) for name in _SEVERAL}
    os.environ.update(dict.fromkeys(_SEVERAL, str(folder)))
    try:
        yield spec.name
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)


def executed(path: Path, folder: Path) -> NotebookNode:
    """The notebook after all its cells ran, with what they showed."""
    notebook = read(path)
    kept = dict(notebook.metadata)
    with own_kernel(folder) as kernel:
        where = {"metadata": {"path": str(FOLDER)}}
        NotebookClient(notebook, kernel_name=kernel, timeout=300, startup_timeout=300, resources=where, record_timing=False).execute()
    notebook.metadata = NotebookNode(kept)
    return notebook


def shown(cell: NotebookNode) -> list[Any]:
    """What a cell shows, as far as it is the same on every machine: texts, and of pictures the size in pixels."""
    found: list[Any] = []
    for output in cell.outputs:
        if output.output_type == "stream" and found and found[-1][0] == output.name:
            found[-1] = (output.name, found[-1][1] + _plain(output.text))
        elif output.output_type == "stream":
            found.append((output.name, _plain(output.text)))
        else:
            own = {kind: _size(value) if kind == "image/png" else _plain(value) for kind, value in output.data.items()}
            found.append((output.output_type, own))
    return found


def _plain(text: str) -> str:
    """Without the name of a temporary folder."""
    return re.sub(r"\S*/pdlab-\w{8}/", "", text)


def _size(png: str) -> tuple[int, int]:
    head = base64.b64decode(png[:64])
    assert head.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", head[16:24])
    return width, height


def main(names: Sequence[str] = ()) -> None:
    """Of all, or of those whose files are named."""
    for path in [Path(name).resolve() for name in names] or PATHS:
        with tempfile.TemporaryDirectory() as folder:
            nbformat.write(executed(path, Path(folder)), path)
        print(path.relative_to(FOLDER.parent))


if __name__ == "__main__":
    main(sys.argv[1:])
