"""Both worlds on this machine: what the file may say, what counts as agreement, and a whole small run (slow)."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pdlab.cli import main
from pdlab.read_yaml import read_yaml
from pdlab.real.validate import Check, TwoWorlds, _descendants, _pin
from pdlab.types import UsageError

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"


@pytest.mark.parametrize("name", ["two_worlds", "two_worlds_full"])
def test_the_files_that_ship_are_sound(name: str) -> None:
    asked = TwoWorlds.load(EXPERIMENTS / f"{name}.yaml")
    assert asked.name == name
    assert len(asked.policies) >= 2
    assert asked.repeats >= 2


def test_mistakes_in_the_file_show_before_anything_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text("experiment: {}\nlayouts: {}\npolicies: {}\nrates: []\nrepeat: 2\n")
    with pytest.raises(UsageError, match="rates") as told:
        TwoWorlds.load(file)
    assert "repeat: unknown key; nearest is repeats" in str(told.value)
    sound = read_yaml(EXPERIMENTS / "two_worlds.yaml")
    sound["policies"] = {"mine": "rund_robin"}
    import yaml

    file.write_text(yaml.safe_dump({**sound, "experiment": {**sound["experiment"], "base_dir": str(EXPERIMENTS)}}))
    with pytest.raises(SystemExit) as ended:
        main(["validate", str(file), "--out", str(tmp_path / "out")])
    assert ended.value.code == 2
    assert "round_robin" in capsys.readouterr().err


def test_a_figure_holds_within_the_bar_or_the_spread_and_never_where_it_is_missing() -> None:
    def check(error: float, spread: float, bound: float = 0.05) -> bool:
        return Check("r", "p", "ttft_s.mean", 1.0, 1.0, error, spread, bound).holds

    assert check(0.05, math.nan)
    assert not check(-0.051, 0.02)
    assert check(-0.08, 0.09)
    assert not check(math.nan, 0.5)


def test_each_engine_gets_a_core() -> None:
    sleep = "import time; time.sleep(60)"
    engine = [sys.executable, "-c", sleep, "-m", "pdlab.real.engine.process"]
    parent = subprocess.Popen([sys.executable, "-c", f"import subprocess\nfor _ in range(2): subprocess.Popen({engine!r})\n{sleep}"])
    try:
        while len(below := _descendants(parent.pid)) < 2 or not all(b"process" in Path(f"/proc/{p}/cmdline").read_bytes() for p in below):
            pass
        _pin(parent.pid)
        given = [os.sched_getaffinity(pid) for pid in below]
        if len(os.sched_getaffinity(0)) >= 2:
            assert [len(cores) for cores in given] == [1, 1]
            assert given[0] != given[1]
    finally:
        for pid in _descendants(parent.pid):
            os.kill(pid, 9)
        parent.kill()
        parent.wait()


@pytest.mark.slow
def test_a_small_run_goes_through_from_calibration_to_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import yaml

    plan = read_yaml(EXPERIMENTS / "two_worlds.yaml")
    plan["experiment"]["workload"]["requests"] = 12
    plan["experiment"]["base_dir"] = str(EXPERIMENTS)
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump({**plan, "repeats": 1, "calibrate_s": 10}))
    with pytest.raises(SystemExit) as ended:
        main(["validate", str(file), "--out", str(tmp_path / "out")])
    assert ended.value.code in (0, 1, None)
    said = capsys.readouterr().out
    assert "of 12 figures are within their bar" in said
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"profile.json", "compare-1.html", "1p1d-least_loaded-2-sim"}
