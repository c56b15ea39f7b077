"""What befalls a command from outside: Ctrl-C at any time, a full disk, another run that writes to the same place, bounds."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pdlab.cli.main import main
from pdlab.core.policy import Policy
from pdlab.core.types import Tick, UsageError
from pdlab.experiment.experiment import Experiment
from pdlab.replay.log import EventLog, cut_to_lines, head_of, read
from pdlab.report.result import Result
from pdlab.sim import simulate

EXPERIMENT = """
model: llama-3.1-8b
workload: {source: synthetic, requests: 200, rate: 20, prompt: 300, output: 40}
cluster:
  instances:
    - {role: prefill, hardware: h100-sxm}
    - {role: decode, hardware: h100-sxm}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(EXPERIMENT)
    return path


def pdlab(*arguments: object, **options: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pdlab", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)  # type: ignore[call-overload,no-any-return]


def failing(file: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The line that it says."""
    with pytest.raises(SystemExit) as exit:
        main(["sim", str(file), "-q", *arguments])
    said = capsys.readouterr().err.strip()
    assert exit.value.code == 2
    assert len(said.splitlines()) == 1 and said.startswith("error: "), said
    return said


# ---------------------------------------------------------------- Ctrl-C


def test_ctrl_c_while_it_is_still_importing_leaves_no_traceback(tmp_path: Path) -> None:
    """A module that takes long to import, and says when it has begun."""
    (tmp_path / "typer.py").write_text("import sys, time\nprint('importing', flush=True)\ntime.sleep(300)\n")
    process = pdlab("models", env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert process.stdout is not None and process.stdout.readline() == b"importing\n"
    process.send_signal(signal.SIGINT)
    _, complained = process.communicate(timeout=120)
    assert (process.returncode, complained) == (130, b"")


def test_where_the_shell_has_it_ignored_it_stays_ignored(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nraise SystemExit(7)\n")
    process = pdlab(
        "models", env={**os.environ, "PYTHONPATH": str(tmp_path)}, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)
    )
    process.communicate(timeout=120)
    assert process.returncode == 7


# ---------------------------------------------------------------- the same folder


def test_two_runs_may_write_to_one_folder(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    runs = [pdlab("sim", file, "-q", "--trace-events", "--out", out) for _ in range(2)]
    for run in runs:
        _, complained = run.communicate(timeout=300)
        assert (run.returncode, complained) == (0, b"")
    assert Result.load(out).summary["completed"] == 200
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run.yaml"], "nothing is left beside it"
    assert (out / "events.jsonl").is_file()


# ---------------------------------------------------------------- a full disk


def entries(path: Path) -> int:
    return sum(1 for _ in read(path)[1])


def experiment() -> Experiment:
    import yaml

    return Experiment.parse(yaml.safe_load(EXPERIMENT))


@pytest.fixture
def full_at(monkeypatch: pytest.MonkeyPatch) -> object:
    """Files may grow to so many bytes; a real limit of the kernel's, whose signal Python has turned into an OSError."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(signal, "SIGXFSZ", signal.SIGXFSZ)  # ignored since Python's start
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_an_event_log_that_cannot_grow_stops_with_a_whole_line_and_the_run_goes_on(tmp_path: Path, full_at) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "events.jsonl"
    full_at(100_000)
    result = simulate(experiment(), trace_events=path)
    assert result.summary["completed"] == 200
    (warning,) = [line for line in result.summary["warnings"] if "event log" in line]
    assert "File too large" in warning
    assert 50_000 < path.stat().st_size <= 100_000
    assert 10 < entries(path) < 2000


def test_a_log_onto_a_device_without_room_says_so(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    log = EventLog(Path("/dev/full"), head_of(experiment(), Policy(), 16))
    for _ in range(2000):
        log.write(1.5, Tick(), [])
    log.close()
    assert log.stopped.startswith("the event log stopped at 1.500 s (No space left on device)")
    log.write(2.0, Tick(), [])
    log.close()


def test_a_log_that_cannot_be_opened_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Is a directory"):
        simulate(experiment(), trace_events=tmp_path)


@pytest.mark.parametrize("size", [1, 20, 100, 65_536, 70_000, 200_000])
def test_a_log_is_cut_to_whole_lines(tmp_path: Path, size: int) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"".join(b"%d\n" % i * 3 for i in range(20_000)) + b"half a li")
    whole = path.read_bytes()
    cut_to_lines(path, size)
    left = path.read_bytes()
    assert whole.startswith(left) and len(left) <= size and (not left or left.endswith(b"\n"))
    assert len(left) > size - 8


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts a small disk")
@pytest.mark.parametrize("requests", [1800, 4000], ids=["which the log just leaves free", "which the log fills"])
def test_results_have_precedence_over_the_log_on_a_small_disk(
    requests: int, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3400k", "tmpfs", str(disk)], capture_output=True, check=False).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        out = disk / "out"
        with pytest.raises(SystemExit) as exit:
            main(["sim", str(file), "-q", "--set", f"workload.requests={requests}", "--trace-events", "--out", str(out)])
        said = capsys.readouterr().err
        assert not exit.value.code, said
        assert len(said.splitlines()) == 1 and "the event log" in said and "No space left on device" in said
        assert Result.load(out).summary["completed"] == requests
        assert entries(out / "events.jsonl") > 0
        subprocess.run(["mount", "-o", "remount,size=3300k", str(disk)], capture_output=True, check=False)
        with pytest.raises(SystemExit) as exit:
            main(["sim", str(file), "--json", "--out", str(disk / "more")])
        captured = capsys.readouterr()
        assert exit.value.code == 2 and "No space left" in captured.err and "Traceback" not in captured.err
        assert '"completed": 200' in captured.out, "the summary is told all the same"
    finally:
        subprocess.run(["umount", str(disk)], check=False)


# ---------------------------------------------------------------- bounds


@pytest.mark.parametrize(
    "words",
    [("sim", "{file}", "--out", "{long}"), ("compare", "{long}", "{long}"), ("trace", "stats", "{long}"), ("models", "show", "{long}")],
)
def test_a_name_that_is_too_long_is_told_in_a_line(file: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as exit:
        main([word.format(file=file, long="x" * 300) for word in words])
    said = capsys.readouterr().err.strip()
    assert exit.value.code == 2
    assert len(said.splitlines()) == 1 and said.startswith("error: "), said


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_behind_stdout_is_told_in_one_line() -> None:
    with open("/dev/full", "wb") as full:
        ended = subprocess.run([sys.executable, "-m", "pdlab", "hardware"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 1
    assert ended.stderr.splitlines() == ["error: what there is to say cannot be written (No space left on device)"]


@pytest.mark.parametrize(
    ("set_", "says"),
    [
        ("engine.block_tokens=1000000000", "engine.block_tokens: must be at most 65536, not 1000000000"),
        ("engine.max_seqs=1000000000", "engine.max_seqs: must be at most 65536"),
        ("engine.max_batch_tokens=1000000000000", "engine.max_batch_tokens: must be at most"),
        ("engine.kv_blocks=1000000000000000", "engine.kv_blocks: must be at most"),
        ("cluster.instances.0.count=1000000", "1,000,001 instances in all, and at most 10,000 can be had"),
        ("cluster.autoscale.max=1000000", "cluster.autoscale.max: must be at most 10000"),
        ("cluster.reports.period_s=1e-9", "cluster.reports.period_s: must be at least 0.001"),
        ("workload.rate=1e-9", "raise workload.rate, or take fewer requests"),
        ("policy={name: freeness, tick_s: 1.0e-9}", "tick_s must be at least 0.001 s"),
    ],
)
def test_what_would_run_for_ever_is_refused_in_one_line(file: Path, capsys: pytest.CaptureFixture[str], set_: str, says: str) -> None:
    began_s = time.process_time()
    assert says in failing(file, capsys, "--set", set_)
    assert time.process_time() - began_s < 10


def test_block_tokens_that_do_not_divide_the_hashes_are_answered_at_once() -> None:
    with pytest.raises(UsageError, match="block_tokens 65521 does not divide"):
        simulate(
            Experiment.parse(
                {
                    "model": "llama-3.1-8b",
                    "workload": {"source": "mooncake-conversation", "requests": 5, "rate": 1.0},
                    "cluster": {"instances": [{"role": "mixed", "hardware": "h100-sxm"}]},
                    "engine": {"block_tokens": 65521},
                }
            )
        )


def test_a_thousand_instances_are_not_a_thousand_times_a_thousand() -> None:
    def cpu_s(count: int) -> float:
        rows = [{"role": role, "count": count // 2, "hardware": "h100-sxm"} for role in ("prefill", "decode")]
        work = {"source": "synthetic", "requests": 50, "rate": 50, "prompt": 300, "output": 20}
        made = Experiment.parse({"model": "llama-3.1-8b", "workload": work, "cluster": {"instances": rows}})
        began_s = time.process_time()
        assert simulate(made).summary["completed"] == 50
        return time.process_time() - began_s

    cpu_s(10)
    assert cpu_s(800) < 15.0
