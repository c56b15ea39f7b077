"""How fast cores are: what is read of the looks, and that somebody looks."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from pdlab.cost.profile import CoreSpeed
from pdlab.proof.validate_host import BIN_S, faults, of_engines, seen
from pdlab.real.host import processes
from pdlab.real.host.core_probe import LOOK, Pace, watched


def pace(folder: Path, *cores: list[tuple[float, float]]) -> Pace:
    """Of looks at so many cores: (when, how long)."""
    files = {}
    for core, looks in enumerate(cores):
        files[core] = folder / str(core)
        files[core].write_bytes(b"".join(LOOK.pack(*look) for look in looks))
    return Pace(files)


def test_looks_are_averaged_over_spans_and_the_nearest_stands_in(tmp_path: Path) -> None:
    looks = pace(tmp_path, [(1.0, 2e-5), (2.0, 4e-5), (3.0, 9e-5)], [(2.5, 1e-5)])
    assert looks.mean_s([0], [(0.5, 2.5), (2.9, 9.0), (2.2, 2.4), (7.0, 8.0)]) == pytest.approx((3e-5, 9e-5, 9e-5, 9e-5))
    assert looks.mean_s([0, 1], [(2.0, 3.0)]) == pytest.approx((2.5e-5,))
    assert pace(tmp_path, []).mean_s([0], [(0.0, 1.0)]) == ()


def test_a_look_that_is_half_written_does_not_count(tmp_path: Path) -> None:
    looks = pace(tmp_path, [(1.0, 2e-5), (2.0, 4e-5)])
    looks.files[0].write_bytes(looks.files[0].read_bytes()[:-3])
    assert looks.mean_s([0], [(0.0, 9.0)]) == pytest.approx((2e-5,))


def test_every_core_is_looked_at_by_what_counts_for_nobody() -> None:
    cores = sorted(os.sched_getaffinity(0))
    before = set(processes.descendants(os.getpid()))  # of other tests
    with watched(cores) as looks:
        began_s = time.monotonic()
        while not all(looks.files[core].stat().st_size >= 10 * LOOK.size for core in cores) and time.monotonic() < began_s + 120:
            time.sleep(0.05)
        assert set(processes.descendants(os.getpid())) <= before
        for core in cores:
            (mean_s,) = looks.mean_s([core], [(began_s, time.monotonic())])
            assert 1e-6 < mean_s < 1e-2
        folder = looks.files[cores[0]].parent
    assert not folder.exists()


def test_a_run_is_seen_in_bins(tmp_path: Path) -> None:
    looks = pace(tmp_path, [(10.1 + 0.25 * k, 1e-5 * (k + 1)) for k in range(4)], [(10.0, 7e-5)])
    first, second = seen(looks, [0, 1], 10.0, 4 * BIN_S - 0.01)
    assert first == pytest.approx([1e-5, 2e-5, 3e-5, 4e-5]) and second == pytest.approx([7e-5] * 4)
    assert seen(pace(tmp_path, [], []), [0, 1], 10.0, 1.0) == []


def test_an_instance_is_slow_while_its_core_is() -> None:
    unsteady = CoreSpeed(prefill_loop_s=2e-5, decode_loop_s=2e-5, prefill_share=0.25, decode_share=0.5)
    slow, calm = 4e-5, 2.01e-5  # twice as long: prefills take 1.25 times as long, decodes 1.5 times
    found = faults([[calm, slow, slow, calm], [1e-5, 1e-5, 1e-5, 3e-5]], ["prefill-0", "decode-0"], unsteady)
    assert found == [
        {"at_s": BIN_S, "slow": "prefill-0", "factor": 0.8, "decode_factor": 0.66, "for_s": 2 * BIN_S},
        {"at_s": 3 * BIN_S, "slow": "decode-0", "factor": 0.88, "decode_factor": 0.8, "for_s": BIN_S},
    ]
    assert faults([[slow]], ["prefill-0"], CoreSpeed()) == [], "nothing is known of how steps go with the loop"
    assert faults([], ["prefill-0"], unsteady) == []
    clocked = unsteady.model_copy(update={"decode_loop_s": 3.2e-5})
    assert faults([[3.2e-5]], ["mixed-0"], clocked) == [], "the engine's own decodes make the loop so long"
    (both,) = faults([[6.4e-5]], ["mixed-0"], clocked)
    assert (both["factor"], both["decode_factor"]) == (0.8, 0.66)


def test_engines_have_a_core_each_or_none_that_is_known() -> None:
    assert of_engines(2, [3, 5, 6]) == [3, 5] and of_engines(2, [1]) == []
