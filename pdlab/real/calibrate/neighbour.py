"""How much longer steps take while another engine of the same machine computes: engines of one CPU share its caches and its memory.

The other engine is a process of its own, `python -m pdlab.real.calibrate.neighbour OPTIONS POINT`, which runs one kind of step for ever.
It is stopped and let go on by turns, so that each ratio is of two measurements made one right after the other.
"""

from __future__ import annotations

import os
import random
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from pdlab.cost.profile import Beside, Point
from pdlab.real.calibrate.bench import Bench
from pdlab.real.calibrate.grid import Bounds
from pdlab.real.engine.load import load
from pdlab.real.engine.options import EngineOptions
from pdlab.types import UsageError

REPEATS = 7
SPARE = 16  # KV tokens that a decode makes besides


def points(bounds: Bounds) -> tuple[Point, Point]:
    """A usual prefill step, and a usual decode step."""
    tokens = min(256, bounds.step_tokens, bounds.max_tokens - SPARE)
    batch = min(4, bounds.seqs)
    return Point(tokens=tokens), Point(batch=batch, context=max(SPARE, min(256, bounds.max_tokens // 2, bounds.kv_tokens // batch - SPARE)))


def measure(bench: Bench, options: EngineOptions, repeats: int = REPEATS, seed: int = 0) -> Beside:
    """Against a second engine of the same options. Raises UsageError where that does not start."""
    prefill, decode = points(bench.bounds)
    rng = random.Random(seed)
    found: dict[str, float] = {}
    for other, busy_with in (("prefill", prefill), ("decode", decode)):
        with _neighbour(options, busy_with) as process:
            ratios: dict[str, list[float]] = {"prefill": [], "decode": []}
            for _ in range(repeats):
                for own, point in rng.sample([("prefill", prefill), ("decode", decode)], 2):
                    process.send_signal(signal.SIGSTOP)
                    alone_s = bench.seconds(point)
                    process.send_signal(signal.SIGCONT)
                    ratios[own].append(bench.seconds(point) / alone_s)
        found |= {f"{own}_beside_{other}": statistics.median(values) for own, values in ratios.items()}
    return Beside(**found)


@contextmanager
def _neighbour(options: EngineOptions, point: Point) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "pdlab.real.calibrate.neighbour", msgspec.json.encode(options).decode(), point.model_dump_json()]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": str(options.threads or 1)})
    assert process.stdout is not None
    try:
        if process.stdout.readline() != b"computing\n":
            raise UsageError("the second engine, for measuring what engines on one machine cost each other, did not start")
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _compute(options: EngineOptions, point: Point) -> None:
    loaded = load(options)
    loaded.engine.runner.warm_up()
    bench = Bench(loaded)
    bench.seconds(point)
    print("computing", flush=True)
    while os.getppid() != 1:
        bench.seconds(point)


if __name__ == "__main__":
    try:
        _compute(msgspec.json.decode(sys.argv[1], type=EngineOptions), Point.model_validate_json(sys.argv[2]))
    except UsageError as error:
        sys.exit(str(error))
