"""make chaos SEED=1 [MINUTES=10]: a real cluster, a seeded schedule of troubles, and after each round: did every request end as it should?

What was tried and what came of it goes to out/chaos/SEED.json, and a table to the terminal.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chaos.dice import Dice, Disk, Round, summed
from tests.chaos.foretold import beside, calibrate, foretold, measured
from tests.real.faults.conftest import Asked, asked, links, store, tiny
from tests.support.links import Links
from tests.support.registry_worlds import Server
from tests.support.served_cluster import cluster, experiment

SEED = os.environ.get("PDLAB_CHAOS", "")
MINUTES = float(os.environ.get("PDLAB_CHAOS_MINUTES", "10"))
RATE = 1.5
CHANGES = {"limits": {"max_attempts": 20}}  # one request may meet several troubles

__all__ = ["asked", "links", "store", "tiny"]  # fixtures


@pytest.mark.skipif(not SEED, reason="ten minutes, opt-in: make chaos SEED=1")
def test_whatever_goes_wrong_every_request_ends_as_it_should(
    tiny: Path, asked: Asked, links: Links, store: Callable[[str], Server], tmp_path: Path
) -> None:
    seed, server = int(SEED), store("etcd" if int(SEED) % 2 else "redis")
    base = experiment(**CHANGES)
    (tmp_path / "engine.json").write_text(json.dumps({**base, "name": "dice", "model": str(tiny)}))
    profile = calibrate(tmp_path, tmp_path / "engine.json", tiny)
    disk = Disk(tmp_path / "disk")
    rounds: list[Round] = []
    try:
        with cluster(tmp_path, tiny, server.url, **CHANGES) as made:
            dice = Dice(made, server, links, disk, seed, RATE)
            end_s = time.monotonic() + 60 * MINUTES
            while time.monotonic() < end_s:
                rounds.append(asyncio.run(dice.round(len(rounds), asked)))
                last = rounds[-1]
                print(
                    f"round {len(rounds)} of {last.took_s:.0f} s: {[(t.kind, t.whom) for t in last.troubles]}, {dict(last.outcomes())}",
                    flush=True,
                )
            dice.end()
    finally:
        disk.close()
        told = [(foretold(played, {**base, "model": str(tiny)}, tmp_path, profile), measured(played)) for played in rounds]
        table = beside(told) if told else []
        out = Path("out/chaos")
        out.mkdir(parents=True, exist_ok=True)
        found = {
            "seed": seed,
            "registry": server.binary,
            "machine": platform.processor() or platform.machine(),
            "minutes": MINUTES,
            **summed(rounds),
        }
        (out / f"{seed}.json").write_text(json.dumps({**found, "foretold": table}, indent=1))
        print(json.dumps(found, indent=1))
        for row in (("", "simulated", "measured"), *table):
            print("".join(f"{cell:<45}" if n == 0 else f"{cell:>14}" for n, cell in enumerate(row)))
    assert len(rounds) >= 2
