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

# The rooms, from the ground (DESIGN §2). A room imports what lies on floors below its own, and itself.
FLOORS = (
    ("core", "kernels"),
    ("policies", "batching", "cost", "workload"),
    ("experiment",),
    ("results",),
    ("replay", "report"),
    ("sim", "real"),
    ("proof", "search"),
    ("lab",),
    ("cli",),
    ("__main__",),
)
# Within real/: what an instance and a router are made of, and what starts them.
REAL = ("host", "net", "transfer", "registry", "models", "engine", "api", "instance", "router", "launch")
WORLDLY = ("pdlab.sim", "pdlab.real", "pdlab.proof", "pdlab.search", "pdlab.lab", "pdlab.kernels")


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
    if any(within(name_of(path), room) for room in WORLDLY):
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


def room(name: str, depth: int = 1) -> str:
    return [*name.split("."), "", ""][depth]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_down_only(path: Path) -> None:
    """For types, too."""
    name = name_of(path)
    if name == "pdlab":  # which passes on what users need
        return
    height = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
    used = {found for found, _ in imports(path) if within(found, "pdlab") and found != "pdlab"}
    assert room(name) in height, f"{name} is in no room of the design"
    up = {found for found in used if room(found) != room(name) and height[room(found)] >= height[room(name)]}
    assert not up, f"{name} imports from beside or above it"
    if room(name) == "real" and room(name, 2):
        up = {found for found in used if room(found) == "real" and REAL.index(room(found, 2)) > REAL.index(room(name, 2))}
        assert not up, f"{name} imports from above it in real/"


def test_there_is_no_import_circle() -> None:
    """For types, too."""
    graph = {name_of(path): {found for found, _ in imports(path) if found in NAMES} for path in MODULES}
    graph["pdlab"] = set()  # imports lazily
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, f"circle: {' -> '.join((*above[above.index(name) :], name))}"
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*above, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


def test_no_module_lies_loose_in_the_package() -> None:
    assert {path.stem for path in (ROOT / "pdlab").glob("*.py")} == {"__init__", "__main__"}


def test_a_class_name_is_used_once() -> None:
    homes: dict[str, list[str]] = {}
    for path in (*MODULES, *(ROOT / "kernels").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                homes.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    assert not {name: files for name, files in homes.items() if len(files) > 1}


def run_python(code: str) -> str:
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_the_package_and_its_command_need_no_torch() -> None:
    blocked = "import sys; sys.modules.update(torch=None, nixl=None, vllm=None)\n"
    names = [name_of(path) for path in MODULES]
    simulator = [
        name for name in names if room(name) not in ("real", "proof", "cli") and not name.endswith((".__main__", ".aic", ".ray_pool"))
    ]
    simulator += [f"pdlab.cli.{name}" for name in ("main", "sim", "trace", "compare", "replay", "schema", "policies", "models", "hardware")]
    run_python(blocked + "\n".join(f"import {name}" for name in simulator))


HEAVY = ("numpy", "pandas", "matplotlib", "pyarrow", "simpy", "pydantic")


def test_importing_the_package_or_the_command_waits_for_nothing_heavy() -> None:
    """Nor does what `--help` of the two longest commands loads: their options alone."""
    heavy = (*HEAVY, "yaml", "asyncio", "fastapi", "pdlab.experiment.deployment", "pdlab.sim", "pdlab.report", "pdlab.real.launch")
    found = f"[m for m in {heavy} if m in sys.modules]"
    assert run_python(f"import sys, pdlab, pdlab.cli.main, pdlab.cli.sim, pdlab.cli.serve; print({found})").strip() == "[]"


def test_simulating_waits_for_nothing_that_draws_or_serves() -> None:
    """What keeps and draws a result comes with what asks for that."""
    others = (
        "pandas",
        "matplotlib",
        "pyarrow",
        "asyncio",
        "ssl",
        "fastapi",
        "typer",
        "rich",
        "multiprocessing",
        "pdlab.real",
        "pdlab.search",
    )
    run = "import sys, pdlab; pdlab.simulate, pdlab.Experiment, pdlab.Result"
    assert run_python(f"{run}; print([m for m in {others} if m in sys.modules])").strip() == "[]"
    keep = "import sys, pdlab.report.html, pdlab.report.perfetto; print([m for m in ('matplotlib', 'plotly') if m in sys.modules])"
    assert run_python(keep).strip() == "[]"


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
