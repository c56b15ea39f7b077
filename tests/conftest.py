"""What several test files share."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from pdlab.core.types import Stage
from pdlab.cost.roofline import Roofline
from pdlab.report.result import Result
from pdlab.results.gaps import Gaps
from pdlab.results.metrics import InstanceUse, LinkUse, summarise
from pdlab.results.records import Records, Samples

NAN = float("nan")
KEPT_BYTES = 3 << 29  # by a process of the tests, which has half of them once all is imported

# Threads of OpenMP (torch's and the kernels', here and in processes that tests start) sleep while they wait. Otherwise those of several
# processes on few cores spin for each other's time: a decode step of a tiny model takes four times the CPU seconds. Set before torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# The same examples each time, however slow the machine; pytest --hypothesis-profile=default searches on.
settings.register_profile("suite", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")


def pytest_collection() -> None:
    """Nine thousand tests and what they import stay to the end: nothing is looked for among them while they come."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Nor need any later look at garbage go through them again."""
    gc.enable()
    gc.collect()
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """The memory of a file's models goes with the file: engines tell the C library to keep what they free, and they are many here."""
    if nextitem is not None and nextitem.path != item.path and _resident_bytes() > KEPT_BYTES:
        gc.collect()
        with contextlib.suppress(AttributeError):  # not glibc
            ctypes.CDLL(None).malloc_trim(0)


def _resident_bytes() -> int:
    with contextlib.suppress(OSError):  # not Linux
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def pytest_unconfigure() -> None:
    """Who looks for leaks at the end finds none."""
    gc.unfreeze()


def made_up_run(
    requests: int = 400,
    *,
    rate: float = 8.0,
    prefill_rate: float = 8000.0,
    gbytes_per_s: float = 25.0,
    step_s: float = 0.02,
    rejected: int = 0,
    seed: int = 1,
    slo: tuple[float, float] = (1.0, 0.05),
) -> Result:
    """A run of 2 prefill and 2 decode instances worked out as a queueing recurrence: no simulator, known times.

    `prefill_rate` is in tokens/s for each instance, `step_s` the decode step of a lone sequence.
    """
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(1 / rate, requests))
    prompts = np.maximum(16, rng.lognormal(6.9, 0.7, requests).astype(int))
    outputs = 1 + rng.geometric(1 / 150, requests)
    names = ["prefill-0", "prefill-1", "decode-0", "decode-1"]
    records, samples, gaps = Records(instances=names, reasons=["queue full"]), Samples(instances=names), Gaps()
    free, busy, link_free, link_busy, sent = [0.0, 0.0], [0.0, 0.0], 0.0, 0.0, 0.0
    for k, t in enumerate(arrivals):
        if k < rejected:
            row = (k, Stage.REJECTED, t, *(NAN,) * 7, t, prompts[k], 0, 0, NAN, NAN, 0, 0, 0, 0, 0, NAN, NAN, 1, 0)
            records.rows.extend(float(x) for x in row)
            continue
        p, d = k % 2, 2 + k % 2
        start = max(t, free[p])
        cached = int(prompts[k] * 0.3) if k % 3 == 0 else 0
        first = start + (prompts[k] - cached) / prefill_rate
        free[p], busy[p] = first, busy[p] + first - start
        size = prompts[k] * 131072
        begin = max(first, link_free)
        end = begin + size / (gbytes_per_s * 1e9)
        link_free, link_busy, sent = end, link_busy + end - begin, sent + size
        decode = end + 0.002
        step = step_s * (1 + 0.3 * rng.random())
        steps = int(outputs[k]) - 1
        finish = decode + steps * step
        gaps.add(decode + step - first)
        gaps.add_run(1, step, 1e-6, steps - 1)
        times = (t, t, start, first, first, begin, end, decode, finish)
        row = (k, Stage.DONE, *times, prompts[k], cached, outputs[k], p, d, size, 1, 0, 0, 0, NAN, NAN, 1, NAN)
        records.rows.extend(float(x) for x in row)
    found = records.columns()
    duration = float(np.nanmax(found["finish_s"]))
    for t in np.arange(0.5, duration, 0.5):
        for i in range(4):
            mine = (found["prefill_instance"] == i) if i < 2 else (found["decode_instance"] == i)
            waiting = mine & (found["arrival_s"] <= t) & (found["prefill_start_s"] > t) if i < 2 else mine & False
            on = ("prefill_start_s", "first_token_s") if i < 2 else ("decode_start_s", "finish_s")
            running = mine & (found[on[0]] <= t) & (found[on[1]] > t)
            blocks = float(found["prompt_tokens"][running].sum()) // 16
            samples.rows.extend((t, i, float(waiting.sum()), 0.0, float(running.sum()), 0.0, min(blocks, 20000.0), 20000.0))
    del found
    uses = []
    for i, name in enumerate(names):
        mine = (samples.column("used_blocks") / 20000)[samples.column("instance") == i]
        uses.append(
            InstanceUse(
                name=name,
                role=name.split("-")[0],
                busy_s=busy[i] if i < 2 else duration * 0.95,
                prefill_busy_s=busy[i] if i < 2 else 0.0,
                decode_busy_s=0.0 if i < 2 else duration * 0.95,
                up_s=duration,
                kv_blocks=20000,
                kv_use_mean=float(mine.mean()),
                kv_use_peak=float(mine.max()),
                requests=requests // 2,
                prefill_tokens=int(prompts.sum()) // 2 if i < 2 else 0,
                decode_tokens=int(outputs.sum()) // 2 if i >= 2 else 0,
                hardware="h100-sxm",
            )
        )
    capacity = gbytes_per_s * 1e9
    used, shared = sent / capacity / duration, link_busy / duration
    link = LinkUse(name="network", bytes=sent, capacity_bytes_per_s=capacity, busy_fraction=shared, utilisation=used, peak_flows=1)
    run: dict[str, Any] = {"seed": seed, "version": "0.1.0", "cpu_s": 0.5}
    summary = summarise(records, gaps, samples, uses, [link], slo=slo, duration_s=duration, run=run)
    experiment = {"name": "made-up", "seed": seed, "slo": {"ttft_s": slo[0], "tpot_s": slo[1]}, "note": "<b>&"}
    return Result(summary, records, gaps, samples, experiment)


@pytest.fixture
def made_run() -> Callable[..., Result]:
    """`made_up_run`, for tests to call with their own figures."""
    return made_up_run


@pytest.fixture
def no_front_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated requests reach the router as they arrive. What an engine's front end takes of a request is fitted to servers; the live
    world of these tests begins behind its own."""
    monkeypatch.setattr(Roofline, "request_s", property(lambda self: 0.0, lambda self, value: None))
