"""Which processes are engines, what they may run on, and what they have used."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdlab.real.host import processes

ROOT = Path(__file__).resolve().parents[3]
SLEEP = "import time; time.sleep(600)"
ENGINE = [sys.executable, "-c", SLEEP, "-m", "pdlab.real.instance.engine_process"]
BUSY = [sys.executable, "-c", f"sum(range(30_000_000)); print('computed', flush=True); {SLEEP}", "-m", "pdlab.real.instance.engine_process"]


@pytest.fixture
def parent(request: pytest.FixtureRequest) -> Iterator[int]:
    """Of two children by the parameter's command."""
    start = f"import subprocess, sys\nfor _ in range(2): subprocess.Popen({request.param!r}, stdout=sys.stdout)\n{SLEEP}"
    process = subprocess.Popen([sys.executable, "-c", start], stdout=subprocess.PIPE)
    try:
        while len(processes.engines(processes.descendants(process.pid))) < 2:
            time.sleep(0.01)
        if request.param is BUSY:
            assert process.stdout is not None
            assert [process.stdout.readline() for _ in range(2)] == [b"computed\n"] * 2
        yield process.pid
    finally:
        for pid in processes.descendants(process.pid):
            os.kill(pid, 9)
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


@pytest.mark.parametrize("parent", [ENGINE], indirect=True)
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_each_engine_gets_a_core(parent: int) -> None:
    processes.pin(parent)
    given = [os.sched_getaffinity(pid) for pid in processes.descendants(parent)]
    assert [len(cores) for cores in given] == [1, 1]
    assert given[0] != given[1]


@pytest.mark.parametrize("parent", [BUSY], indirect=True)
def test_what_engines_use_is_told_from_what_the_others_use(parent: int) -> None:
    engines_s, others_s = processes.cpu_s(parent)
    assert engines_s > 0.1
    assert others_s < engines_s


@pytest.mark.parametrize("parent", [ENGINE], indirect=True)
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_what_serves_engines_can_be_put_elsewhere(parent: int) -> None:
    first, second, *_ = sorted(os.sched_getaffinity(0))
    processes.pin(parent)
    before = [os.sched_getaffinity(pid) for pid in processes.descendants(parent)]
    for core in (first, second):
        processes.serve_on(parent, {core})
        assert os.sched_getaffinity(parent) == {core}
        assert [os.sched_getaffinity(pid) for pid in processes.descendants(parent)] == before


def processes_of(parent: int) -> list[int]:
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [pid for pid in pids if processes._parent(pid) == parent]


def test_cores_are_kept_awake_by_what_counts_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    def spinning() -> list[set[int]]:
        return [os.sched_getaffinity(pid) for pid in processes_of(os.getpid()) if processes.BESIDE in processes._command(pid)]

    monkeypatch.setattr(processes, "wander", lambda: False)
    with processes.awake():
        assert spinning() == []
    monkeypatch.setattr(processes, "wander", lambda: True)
    before = processes.descendants(os.getpid())
    with processes.awake():
        until = time.monotonic() + 60
        while sorted(map(sorted, spinning())) != [[core] for core in sorted(os.sched_getaffinity(0))]:
            assert time.monotonic() < until
            time.sleep(0.01)
        assert processes.descendants(os.getpid()) == before
        own = [pid for pid in processes_of(os.getpid()) if processes.BESIDE in processes._command(pid)]
        assert {os.getsid(pid) for pid in own} == {os.getsid(0)}, "between sessions cores are shared evenly"
        assert os.getpgid(0) not in {os.getpgid(pid) for pid in own}, "Ctrl-C is not for them"
    assert spinning() == []


def test_our_own_modules_are_those_that_run_here_whatever_lies_in_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "pdlab").mkdir()
    (tmp_path / "pdlab" / "__init__.py").write_text("raise SystemExit('the wrong one')")
    ended = subprocess.run([*processes.MODULE, "pdlab", "--version"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_every_module_of_ours_is_started_so() -> None:
    started = [path for path in (ROOT / "pdlab").rglob("*.py") if re.search(r'"-m",\s*"pdlab', path.read_text(encoding="utf-8"))]
    assert not started, "use processes.MODULE"
