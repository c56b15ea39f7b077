"""A cluster of this machine's own, on cores of which it is known who has them, and what serving it costs."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import pytest

from pdlab.core.types import UsageError
from pdlab.proof.calibrate.front import through
from pdlab.proof.calibrate.grid import Bounds
from pdlab.proof.local_cluster import local_cluster
from pdlab.real.host import processes

PLAN = {
    "workload": {"source": "azure-conv-2023", "requests": 1, "rate": 1.0},
    "cluster": {"instances": [{"role": "prefill", "hardware": "l4"}, {"role": "decode", "hardware": "l4"}]},
    "engine": {"block_tokens": 16, "kv_blocks": 200, "max_seqs": 4, "max_batch_tokens": 128},
}


def test_a_cluster_of_this_machine_is_pinned_and_what_serves_it_measured(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(json.dumps({"model": str(model), **PLAN}))
    everywhere, before = os.sched_getaffinity(0), set(processes.descendants(os.getpid()))
    with local_cluster(file, ["--threads", "2"]) as url:
        own = [pid for pid in processes.engines(processes.descendants(os.getpid())) if pid not in before]
        assert len(own) == 2
        if len(everywhere) > 1:
            prefill, decode = (os.sched_getaffinity(pid) for pid in own)
            assert len(prefill) == len(decode) == 1 and prefill != decode
            here = os.sched_getaffinity(0)
            assert here == (everywhere - prefill - decode or decode), "the client, where the router is"
        router_s, front = asyncio.run(through(url, Bounds(128, 4, 400, 3200), 256, 0.0))
        assert router_s >= 0
        assert front.request_s + front.step_s + front.token_s > 0
    assert os.sched_getaffinity(0) == everywhere
    assert not set(processes.descendants(os.getpid())) - before


def test_a_cluster_that_does_not_start_says_why(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(json.dumps({"model": str(tmp_path / "nothing"), **PLAN}))
    with pytest.raises(UsageError, match=r"the cluster did not start: (.|\n)*nothing"), local_cluster(file, []):
        pass
