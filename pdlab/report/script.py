"""What makes a page's figures answer: hover, zoom, sort. The lab's pages load the same files; report.html has them within it."""

from __future__ import annotations

import base64
import gzip
import json
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

STATIC = Path(__file__).parent / "static"
_OF_A_REPORT = ("parts.js", "charts.js", "run_figures.js", "report.js")


def plotly_js() -> Path:
    """The library that draws, which its package has within it. The package itself is not loaded: that takes longer than a simulation."""
    found = find_spec("plotly")
    assert found is not None and found.submodule_search_locations, "pyproject.toml asks for it"
    return Path(found.submodule_search_locations[0]) / "package_data" / "plotly.min.js"


def report_script(told: dict[str, Any]) -> list[str]:
    """Parts of a page: `told` for the script, the library, packed, and the script."""
    plain = json.dumps(told, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return [
        f'<script type="application/json" id="told">{plain}</script>',
        f'<script type="text/plain" id="plotly">{_packed()}</script>',
        f'<script type="module">\n{_joined()}</script>',
    ]


@cache
def _packed() -> str:
    return base64.b64encode(gzip.compress(plotly_js().read_bytes(), 6, mtime=0)).decode()


@cache
def _joined() -> str:
    """One module of several, which name nothing twice."""
    lines = [line for name in _OF_A_REPORT for line in (STATIC / name).read_text(encoding="utf-8").splitlines(keepends=True)]
    return "".join(line.removeprefix("export ") for line in lines if not line.startswith("import "))
