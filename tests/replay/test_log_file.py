"""Logs on a full disk: they stop, and serving goes on."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from pdlab.core.types import Tick
from pdlab.experiment.make_router import router
from pdlab.real.api.metrics import EngineMetrics
from pdlab.real.launch import router as serve
from pdlab.real.router.cluster_engine import ClusterEngine
from pdlab.replay import scheduler_log as decisions
from pdlab.replay.log import read
from pdlab.replay.log_file import LogFile
from tests.support.virtual_cluster import PULL, Run, cluster, played


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """32 KiB."""
    where = tmp_path / "disk"
    where.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(where)], capture_output=True).returncode:
        pytest.skip("a tmpfs can be mounted by root only")
    yield where
    subprocess.run(["umount", "-l", str(where)], check=True)


def test_what_stands_in_it_is_whole_lines_and_what_is_missing_is_counted(small_disk: Path) -> None:
    said: list[str] = []
    log = LogFile(small_disk / "log", said.append)
    for number in range(1000):
        log.write(b"%04d " % number + b"x" * 94 + b"\n")
    log.close()
    lines = (small_disk / "log").read_bytes().splitlines(keepends=True)
    assert 0 < len(lines) < 1000 and log.dropped == 1000 - len(lines)
    assert all(len(line) == 100 and line.startswith(b"%04d " % number) for number, line in enumerate(lines))
    assert said == ["No space left on device"]


def test_a_device_that_takes_nothing() -> None:
    said: list[str] = []
    log = LogFile(Path("/dev/full"), said.append)
    log.write(b"a line\n")
    log.close()
    assert log.dropped == 1 and said == ["No space left on device"]


def test_a_routers_world_goes_on_and_what_it_kept_can_be_read(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)

    async def play(made: Run) -> None:
        for _ in range(150):
            made.submit(100, 5)
            await asyncio.sleep(0.02)
        assert made.world.down is None
        assert made.log is not None
        made.log.flush()
        figures = EngineMetrics("m", ClusterEngine(made.world, "m", 300)).exposition().decode()
        (line,) = [line for line in figures.splitlines() if line.startswith("pdlab:router_log_lines_dropped_total")]
        assert float(line.rsplit(" ", 1)[1]) == made.log.dropped > 0

    path = small_disk / "events"
    made = played(cluster(PULL), play, path)
    assert all(client.done for client in made.clients.values())
    head, entries = read(path)
    assert head.policy == "least_loaded" and len(list(entries)) > 10
    assert sum("No space left" in record.getMessage() for record in caplog.records) == 1


def test_a_server_says_once_that_its_event_log_has_stopped(caplog: pytest.LogCaptureFixture) -> None:
    experiment = cluster(PULL)
    with serve.event_log(experiment, router(experiment, hash_tokens=16), Path("/dev/full")) as log:
        assert log is not None
        for _ in range(1000):
            log.write(2.5, Tick(), [])
    (said,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert said == log.stopped and said.startswith("the event log stopped at 2.500 s (No space left on device): /dev/full keeps")


def test_an_engines_decisions_stop_where_the_disk_is_full(small_disk: Path) -> None:
    log = LogFile(small_disk / "decisions", lambda _: None)
    setup = decisions.Setup(1000, prefix_cache=False)
    scheduler = decisions.Recorded(setup, setup.scheduler(), log)
    for order in range(1, 1000):
        seq = decisions.Sequence(order, 1, 100, 5)
        scheduler.submit(seq)
        scheduler.remove(seq)
    log.close()
    assert log.dropped
    for line in (small_disk / "decisions").read_bytes().splitlines():
        msgspec.json.decode(line)


def test_a_log_that_cannot_be_opened_says_so(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Is a directory"):
        LogFile(tmp_path, print)


def test_a_server_whose_output_is_lost_serves_on(tmp_path: Path) -> None:
    """Standard output on a full disk: what is said there is lost, and no error."""
    code = (
        "import os, sys\nfrom pdlab.real.host.logs import configured\nwith configured('info', 'text', instance='') as say:\n"
        "    say('a line')\nsys.stderr.write('on\\n')\nsys.stderr.flush()\nos._exit(0)"
    )
    with open("/dev/full", "w") as full:
        ran = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert ran.returncode == 0 and ran.stderr.endswith("on\n")
