"""What memory there is: the kernel's own figure, and the limits of control groups, on recorded trees."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from pdlab.core.types import UsageError
from pdlab.real.engine import memory
from pdlab.real.engine.options import EngineOptions
from pdlab.real.instance.engine_client import EngineClient
from pdlab.real.launch.instance import Listening, run

GIB = 2**30
MEMINFO = "MemTotal:       25165824 kB\nMemFree:          200000 kB\nMemAvailable:    7025459 kB\nCached:          6800000 kB\n"


def tree(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def available(folder: Path, group: str, files: dict[str, str]) -> int:
    proc = tree(folder / "proc", {"meminfo": MEMINFO, "self/cgroup": group})
    return memory.available_bytes(proc, tree(folder / "cgroup", files))


def test_the_page_cache_is_not_taken_for_used(tmp_path: Path) -> None:
    assert available(tmp_path, "0::/\n", {}) == 7025459 * 1024


def test_a_container_that_may_use_less_counts(tmp_path: Path) -> None:
    files = {"memory.max": f"{2 * GIB}", "memory.current": f"{GIB}", "memory.stat": f"anon {GIB}\ninactive_file 1000\nactive_file 24\n"}
    assert available(tmp_path, "0::/app\n", {f"app/{name}": text for name, text in files.items()}) == GIB + 1024


def test_the_limit_of_a_group_above_counts(tmp_path: Path) -> None:
    above = {"slice/memory.max": f"{GIB}", "slice/memory.current": f"{GIB // 4}", "slice/memory.stat": "anon 1\n"}
    own = {"slice/app/memory.max": "max\n", "slice/app/memory.current": "5", "slice/app/memory.stat": "anon 1\n"}
    assert available(tmp_path, "0::/slice/app\n", above | own) == GIB - GIB // 4


def test_version_1_of_control_groups(tmp_path: Path) -> None:
    files = {"limit_in_bytes": f"{3 * GIB}", "usage_in_bytes": f"{4 * GIB}", "stat": "inactive_file 0\n"}
    group = "5:cpu,cpuacct:/x\n4:memory:/docker/1\n"
    assert available(tmp_path, group, {f"memory/docker/1/memory.{name}": text for name, text in files.items()}) == 0


def test_no_proc_leaves_what_the_machine_has(tmp_path: Path) -> None:
    assert memory.available_bytes(tmp_path / "none", tmp_path) > 0


def test_several_engines_need_the_sum_and_the_line_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = EngineOptions(model="llama-3.1-8b", load_format="dummy", kv_gib=0.6)
    monkeypatch.setattr(memory, "available_bytes", lambda: GIB)
    memory.check_cpu_kv(engine)
    with pytest.raises(
        UsageError, match=r"KV memory of 1\.2 GiB for 2 instances exceeds the 1\.0 GiB .* available here: give less with --kv-gib"
    ):
        memory.check_cpu_kv(engine, engine)


def test_a_server_that_finds_no_room_says_so_before_it_starts_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("an engine was started")

    monkeypatch.setattr(EngineClient, "start", never)
    options = EngineOptions(model="llama-3.1-8b", load_format="dummy", kv_gib=1e6)
    with pytest.raises(UsageError, match=r"KV memory of 1000000\.0 GiB exceeds the .* give less with --kv-gib"):
        asyncio.run(run(options, Listening(port=0)))
