"""`make compile` brings every stub that mypyc's check of the hot modules asks for: mypy ends there without one, since it knows that a
library's types come apart from it."""

from __future__ import annotations

import ast
import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
from mypy.stubinfo import stub_distribution_name

ROOT = Path(__file__).resolve().parents[1]


def hot_modules(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that setup.py compiles."""
    monkeypatch.delenv("PDLAB_COMPILE", raising=False)
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    return list(runpy.run_path(str(ROOT / "setup.py"))["HOT"])


def imported(path: Path) -> Iterator[str]:
    """Modules that a file imports, within functions and for types, too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def source_of(module: str) -> Path | None:
    base = ROOT.joinpath(*module.split("."))
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


def reached(files: list[str]) -> set[str]:
    """All that mypy follows from these files: our own modules and the packages around them, and the names of others'."""
    waiting, seen, others = [ROOT / file for file in files], set[Path](), set[str]()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        waiting.extend(around for above in path.parents if (around := above / "__init__.py").is_file() and above != ROOT)
        for module in imported(path):
            if not module.startswith("pdlab"):
                others.add(module)
            elif (source := source_of(module)) is not None:
                waiting.append(source)
    return others


def installed_by_the_target() -> set[str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    recipe = re.search(r"^build/compiled/stamp:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    assert recipe is not None
    line = next(line for line in recipe[1].splitlines() if "$(INSTALL)" in line)
    return set(line.split()[1:])


def test_the_compile_target_installs_the_stubs_that_its_check_reaches(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = {stub for module in reached(hot_modules(monkeypatch)) if (stub := stub_distribution_name(module)) is not None}
    assert {"pandas-stubs", "types-PyYAML"} <= needed, "the hot modules reach tables and the experiment file"
    assert needed <= installed_by_the_target()
