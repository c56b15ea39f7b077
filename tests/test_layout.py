"""The design's lines, read off the source: imports go one way, worlds keep apart, decisions know no clock."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from pdlab.experiment.experiment import Experiment
from pdlab.policies import load as load_policy
from pdlab.proof.validate import TwoWorlds

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted((ROOT / "pdlab").rglob("*.py"))
WORLDS = ("pdlab.sim", "pdlab.real", "pdlab.kernels")

# What a module may import of pdlab, by DESIGN §2; a package stands for all in it, the longest name that fits counts.
ALLOWED = {
    "pdlab.core.types": (),
    "pdlab.core.prefix": (),
    "pdlab.core.kv": ("pdlab.core.types",),
    "pdlab.core.predict": ("pdlab.core.types",),
    "pdlab.core.reach": (),
    "pdlab.core.view": ("pdlab.core.types", "pdlab.core.predict", "pdlab.core.reach"),
    "pdlab.core.policy": ("pdlab.core.types", "pdlab.core.view"),
    "pdlab.policies": ("pdlab.core.types", "pdlab.core.view", "pdlab.core.policy", "pdlab.policies"),
    "pdlab.policies.compose": ("pdlab.core.types", "pdlab.core.view", "pdlab.core.policy"),
    "pdlab.core.blame": ("pdlab.core.policy",),
    "pdlab.core.watchdog": ("pdlab.core.types", "pdlab.core.policy", "pdlab.core.blame"),
    "pdlab.policies.load": ("pdlab.core.types", "pdlab.core.policy", "pdlab.policies.compose", "pdlab.core.blame"),
    "pdlab.core.scheduler": ("pdlab.core.types", "pdlab.core.kv"),
    "pdlab.core.report": ("pdlab.core.types", "pdlab.core.kv", "pdlab.core.scheduler"),
    "pdlab.replay.scheduler_log": ("pdlab.core.types", "pdlab.core.kv", "pdlab.core.scheduler", "pdlab.batching"),
    "pdlab.batching": ("pdlab.core.types", "pdlab.core.scheduler"),
    "pdlab.core.router": ("pdlab.core.types", "pdlab.core.view", "pdlab.core.policy", "pdlab.core.blame"),
    "pdlab.core.teller": ("pdlab.core.types", "pdlab.core.router"),
    "pdlab.replay.log_file": (),
    "pdlab.core.strict": (),
    "pdlab.replay.log": ("pdlab.core.types", "pdlab.replay.log_file", "pdlab.core.router"),
    "pdlab.cost": ("pdlab.core.types", "pdlab.cost", "pdlab.core.strict"),
    "pdlab.cli.trace": ("pdlab.core.types", "pdlab.workload", "pdlab.results.units", "pdlab.experiment.mistakes", "pdlab.experiment.yaml"),
    "pdlab.report.workload": ("pdlab.workload", "pdlab.report.look"),
    "pdlab.workload": ("pdlab.core.types", "pdlab.workload", "pdlab.results.units", "pdlab.core.strict"),
}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def imports(path: Path) -> tuple[tuple[str, bool], ...]:
    """(module, at run time) of every import in a file; `from a import b` counts as a.b where that is a module, else as a."""
    return tuple(_imports(ast.parse(path.read_text(encoding="utf-8")), True))


def _imports(node: ast.AST, runtime: bool) -> Iterator[tuple[str, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, runtime) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            for alias in child.names:
                inner = f"{child.module}.{alias.name}"
                yield (inner if inner in NAMES else child.module or ""), runtime
        else:
            typing_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
            yield from _imports(child, runtime and not typing_only)


NAMES = {name_of(path) for path in MODULES}


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_decisions_know_neither_clock_nor_accelerator(path: Path) -> None:
    if any(within(name_of(path), world) for world in WORLDS):
        return
    roots = {name.split(".")[0] for name, runtime in imports(path)}
    assert not roots & {"simpy", "asyncio", "torch", "time"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_randomness_comes_from_a_generator_that_was_passed(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    drawn = [
        f"{ast.unparse(node.func)} in line {node.lineno}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).startswith(("random.", "np.random.", "numpy.random."))
        and ast.unparse(node.func).rsplit(".", 1)[1] not in ("Random", "default_rng", "Generator", "PCG64", "SeedSequence")
    ]
    assert not drawn


def test_the_worlds_do_not_know_each_other() -> None:
    for path in MODULES:
        for one, other in (("pdlab.sim", "pdlab.real"), ("pdlab.real", "pdlab.sim")):
            if within(name_of(path), one):
                assert not [name for name, _ in imports(path) if within(name, other)], f"{name_of(path)} imports {other}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_the_one_way_of_the_design(path: Path) -> None:
    name = name_of(path)
    layer = max((key for key in ALLOWED if within(name, key)), key=len, default=None)
    used = {found for found, _ in imports(path) if within(found, "pdlab") and found != name}
    if layer is not None:
        assert not {found for found in used if not any(within(found, allowed) for allowed in (*ALLOWED[layer], layer))}
    elif not any(within(name, top) for top in ("pdlab.sim", "pdlab.real", "pdlab.cli.main", "pdlab.__main__")) and name != "pdlab":
        assert not {found for found in used if any(within(found, top) for top in ("pdlab.sim", "pdlab.real", "pdlab.cli.main"))}


def test_there_is_no_import_cycle() -> None:
    graph = {name_of(path): {found for found, runtime in imports(path) if runtime and found in NAMES} for path in MODULES}
    for package in [name for name in graph if (ROOT / name.replace(".", "/")).is_dir()]:
        graph[package] = {found for found in graph[package] if not within(found, package)}  # a package gathers its own modules' names
    graph["pdlab"] = set()  # imports lazily
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, f"cycle: {' -> '.join((*above[above.index(name) :], name))}"
        if name not in done:
            for other in graph[name]:
                visit(other, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def run_python(code: str) -> str:
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_the_package_and_its_command_need_no_torch() -> None:
    blocked = "import sys; sys.modules.update(torch=None, nixl=None, vllm=None)\n"
    names = [name_of(path) for path in MODULES]
    simulator = [name for name in names if not within(name, "pdlab.real") and not name.endswith((".__main__", ".aic"))]
    run_python(blocked + "\n".join(f"import {name}" for name in simulator))


def test_importing_the_package_or_the_command_waits_for_nothing_heavy() -> None:
    heavy = "[m for m in ('numpy', 'pandas', 'matplotlib', 'pyarrow', 'simpy', 'pydantic') if m in sys.modules]"
    assert run_python(f"import sys, pdlab, pdlab.cli.main; print({heavy})").strip() == "[]"


def test_every_public_name_of_the_package_is_there() -> None:
    run_python("import pdlab; [getattr(pdlab, name) for name in pdlab.__all__]; assert set(pdlab.__all__) <= set(dir(pdlab))")


def test_a_name_the_package_lacks_is_an_attribute_error() -> None:
    import pdlab

    with pytest.raises(AttributeError, match="no attribute 'Simulator'"):
        _ = pdlab.Simulator  # type: ignore[attr-defined]


def test_every_package_is_shipped() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = set(project["tool"]["setuptools"]["packages"])
    there = {name_of(path) for path in MODULES if path.name == "__init__.py"} | {"pdlab.kernels"}
    there |= {f"pdlab.kernels.{path.parent.name}" for path in (ROOT / "kernels").glob("*/__init__.py")}
    assert listed == there


def test_every_data_file_is_shipped() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"]
    shipped = {
        path for package, globs in patterns.items() for pattern in globs for path in (ROOT / package.replace(".", "/")).glob(pattern)
    }
    there = {path for path in (ROOT / "pdlab").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc", ".pyo")}
    assert there <= shipped, f"add to package-data: {sorted(map(str, there - shipped))}"


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_experiment_loads(path: Path) -> None:
    kind = TwoWorlds if path.stem.startswith("two_worlds") else Experiment
    assert kind.load(path).name == path.stem


@pytest.mark.parametrize("name", load_policy.names())
def test_every_policy_says_in_a_sentence_how_it_decides(name: str) -> None:
    module = sys.modules[load_policy.policy_class(name, Path()).__module__]
    assert module.__doc__
    assert ". " in f"{module.__doc__.strip()} "
