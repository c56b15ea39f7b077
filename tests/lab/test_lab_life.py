"""What becomes of jobs when processes die, take too much, or the lab itself is killed; and who is let in."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import httpx
import pytest

from pdlab import UsageError
from pdlab.cli.main import main
from pdlab.lab import Client
from pdlab.lab.client import LabJob
from tests.support.lab_world import lab, long, small
from tests.support.waiting import until

TOKEN = "a-token-of-the-tests-ä"


def under_way(job: LabJob) -> None:
    next(event for event in job.events() if event["progress"].get("done"))


def test_a_killed_lab_loses_nothing(tmp_path: Path) -> None:
    with lab(tmp_path, "--jobs", "1") as world, Client(world.url) as client:
        done = client.submit(small(), tags=["kept"]).wait(60)
        running = client.submit(small(workload__requests=80_000))
        waiting = client.submit(small(seed=3))
        under_way(running)
        simulating = world.workers()
        world.kill()
        until(lambda: not [pid for pid in simulating if Path(f"/proc/{pid}").exists()])
        world.start()
        assert client.get(done.id).summary["requests"] == 60
        assert client.get(done.id).told["tags"] == ["kept"]
        for job in (running, waiting):
            job.refresh().wait(60)
        assert running.summary["requests"] == 80_000


def test_a_job_whose_process_is_killed_is_run_again_once_and_then_fails_with_the_reason(tmp_path: Path) -> None:
    with lab(tmp_path, "--jobs", "1") as world, Client(world.url) as client:
        once, twice = client.submit(small(workload__requests=60_000)), client.submit(long())
        under_way(once)
        os.kill(world.workers()[0], signal.SIGKILL)
        assert once.wait(60).summary["requests"] == 60_000
        for _ in range(2):
            under_way(twice)
            before = world.workers()
            os.kill(before[0], signal.SIGKILL)
            until(lambda before=before: world.workers() != before)  # type: ignore[misc]
        with pytest.raises(UsageError, match=r"was killed by SIGKILL, as a system without free memory does, 2 times"):
            twice.wait(60)


@pytest.mark.slow
def test_time_and_memory_of_a_job_are_bounded(tmp_path: Path) -> None:
    with lab(tmp_path, "--job-time-s", "1.5") as world, Client(world.url) as client:
        with pytest.raises(UsageError, match=r"it took longer than 1.5 s: ask for less, or start the lab with --job-time-s"):
            client.submit(long()).wait(30)
        world.stop()
        world.options = ("--job-gib", "0.05")
        world.start()
        with pytest.raises(UsageError, match=r"it took more than 0.05\d* GiB of memory"):
            client.submit(long(seed=2)).wait(30)


def test_a_token_is_asked_for_and_a_browser_logs_in_with_it(tmp_path: Path) -> None:
    with lab(tmp_path, token=TOKEN) as world:
        assert httpx.get(f"{world.url}/api/v1/experiments").status_code == 401
        for wrong in ("Bearer x", "Basic a", "Bearer ä".encode().decode("latin-1"), "Bearer"):
            assert httpx.get(f"{world.url}/api/v1/experiments", headers={"authorization": wrong.encode("latin-1")}).status_code == 401
        with pytest.raises(UsageError, match=r"asks for its token"), Client(world.url, "x") as client:
            client.experiments()
        with Client(world.url, TOKEN) as client:
            assert client.submit(small()).wait(60).state == "done"
        assert httpx.get(f"{world.url}/healthz").json() == {"status": "ok"}, "who has no token learns no more"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--host", "0.0.0.0"], "others reach it, so it needs a token: set PDLAB_LAB_TOKEN"),
        (["--jobs", "0"], "--jobs 0: it takes a process at least"),
        (["--jobs", "100000"], "--jobs 100000: this machine has "),
        (["--token", "x"], "PDLAB_LAB_TOKEN: 1 characters can be guessed: give 16 or more"),
        (["--uploads-gib", "nan"], "--uploads-gib nan: give a number above 0"),
        (["--router", "a=http://h", "--registry", "a=etcd://h:1"], "--registry a: a --router has that name, too"),
        (["--db", "mysql://x"], "write sqlite:///path/lab.db"),
        (["--job-gib", "0"], "--job-gib 0: give a number above 0"),
        (["--job-gib", "nan"], "--job-gib nan: give a number above 0"),
        (["--job-gib", "inf"], "--job-gib inf: give a number above 0"),
        (["--job-time-s", "nan"], "--job-time-s nan: give a number above 0"),
        (["--job-silence-s", "0"], "--job-silence-s 0: give a number above 0"),
        (["--max-queued", "0"], "--max-queued 0: give a number above 0"),
        (["--out", "/proc/x"], "--out /proc/x: cannot write there"),
        (["--host", "256.1.1.1", "--token", "x" * 16], "give another --host"),
    ],
)
def test_a_wrong_option_is_told_in_a_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = [] if "--out" in words else ["--out", str(tmp_path)]
    with pytest.raises(SystemExit) as ended:
        main(["lab", "--port", "0", *out, *words])
    told = capsys.readouterr().err
    assert ended.value.code == 2
    assert said in told
    assert "Traceback" not in told


def test_a_port_or_a_folder_that_is_taken_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with lab(tmp_path) as world:
        for words, said in ((["--port", str(world.port)], "Address already in use"), (["--port", "0"], "another pdlab lab uses it")):
            with pytest.raises(SystemExit):
                main(["lab", "--out", str(tmp_path), *words])
            assert said in capsys.readouterr().err


def test_who_talks_to_no_lab_is_told() -> None:
    with Client("http://127.0.0.1:1") as client, pytest.raises(UsageError, match=r"no lab answers at http://127.0.0.1:1 "):
        client.experiments()
