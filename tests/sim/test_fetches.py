"""Prefixes that are read elsewhere, in the simulator: what comes, what does not, and what the router hears of it."""

from __future__ import annotations

from collections import Counter
from typing import Any, cast

import numpy as np
import pytest

from pdlab.core.types import Action, AnyEvent, Dispatch, Fetch, Fetched, Finished, PrefillDone
from pdlab.experiment.experiment import Experiment
from pdlab.replay.log import EventLog
from pdlab.sim import build
from pdlab.workload.base import Workload

PROMPT, ALONE_S = 2000, 20.0
HASHES = tuple(range(125))


class Log:
    def __init__(self) -> None:
        self.events: list[AnyEvent] = []
        self.actions: list[Action] = []

    def write(self, now: float, event: AnyEvent, actions: list[Action]) -> None:
        self.events.append(event)
        self.actions += actions


def run(*, slow: float = 25.0, decode_caches: bool = False, **more: Any) -> tuple[Log, Any]:
    """A prompt, alone; then it again behind a long one that keeps its holder busy."""
    plan = Experiment.parse(
        {
            "name": "fetches",
            "model": "llama-3.1-8b",
            "workload": {"source": "synthetic", "requests": 3, "rate": 1, "prompt": 10, "output": 10},
            "cluster": {
                "instances": [
                    {"role": "prefill", "count": 2, "hardware": "a10", "nics": 1},
                    {"role": "decode", "hardware": "a10", "nics": 1, "engine": {"prefix_cache": decode_caches}},
                ],
                "network": {"gbytes_per_s": slow},
            },
            "policy": {"dispatch": {"name": "p2p_prefix"}},
            "limits": {"request_timeout_s": 120.0},
            **more,
        }
    )
    work = Workload(
        "three",
        arrival_s=np.array([0.0, ALONE_S, ALONE_S + 0.01]),
        prompt_tokens=np.array([PROMPT, 6000, PROMPT + 8], np.int32),
        output_tokens=np.array([3, 3, 3], np.int32),
        hashes=[HASHES, (), HASHES],
        hash_tokens=16,
    )
    log = Log()
    world = build.world(plan, work, log=cast(EventLog, log))
    world.run()
    assert world.leaked_blocks == 0
    assert Counter(type(e).__name__ for e in log.events)["Finished"] == 3
    return log, world


def of(log: Log, kind: type) -> list[Any]:
    return [e for e in (*log.events, *log.actions) if isinstance(e, kind)]


def test_a_prefix_is_read_and_only_the_rest_computed() -> None:
    log, _ = run()
    assert of(log, Fetch) == [Fetch(2, 1, "prefill-1", "prefill-0", PROMPT)]
    (fetched,) = of(log, Fetched)
    size = PROMPT * 131072  # llama-3.1-8b's KV: 2 x 32 layers x 8 heads x 128 x 2 bytes a token
    assert (fetched.tokens, fetched.size_bytes) == (PROMPT, size)
    assert fetched.seconds == pytest.approx(size / 25e9, rel=0.01)
    done = next(e for e in of(log, PrefillDone) if e.request_id == 2)
    assert done.cached_tokens == PROMPT


def test_a_decode_instance_lends_too() -> None:
    log, _ = run(decode_caches=True)
    assert of(log, Fetch) == [Fetch(2, 1, "prefill-1", "decode-0", PROMPT)]
    assert of(log, Fetched)[0].tokens == PROMPT


def test_a_slow_link_is_left_alone() -> None:
    log, _ = run(slow=0.3)
    assert not of(log, Fetch)
    assert [a.instance for a in of(log, Dispatch)] == ["prefill-0", "prefill-0", "prefill-1"]


@pytest.mark.parametrize(
    ("faults", "unreachable"),
    [
        ([{"at_s": ALONE_S + 0.02, "kill": "prefill-0"}], False),
        ([{"at_s": ALONE_S + 0.02, "cut": ["prefill-0", "prefill-1"], "for_s": 5.0}], True),
        ([{"at_s": ALONE_S - 1.0, "cut": ["prefill-0", "prefill-1"], "for_s": 5.0}], True),
    ],
)
def test_where_it_does_not_come_it_is_computed(faults: list[dict[str, Any]], unreachable: bool) -> None:
    log, _ = run(slow=1.5, faults=faults)  # 0.17 s
    fetched = next(e for e in of(log, Fetched) if e.request_id == 2)
    assert (fetched.tokens, fetched.unreachable) == (0, unreachable)
    assert next(e for e in of(log, PrefillDone) if e.request_id == 2).cached_tokens == 0
    assert any(e.request_id == 2 for e in of(log, Finished))
