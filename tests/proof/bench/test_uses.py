from __future__ import annotations

import math

import numpy as np
import pytest

from pdlab.proof.bench.overhead import warnings
from pdlab.proof.bench.poll import read
from pdlab.proof.bench.uses import length_s, spans
from pdlab.results.records import Samples

PAGE = """# HELP vllm:num_requests_running Sequences.
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_waiting{engine="0",model_name="m"} 2.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:cache_config_info{block_size="16",num_gpu_blocks="400",engine="0"} 1.0
"""


def test_time_is_counted_once_where_stretches_overlap() -> None:
    start, end = np.array([0.0, 1.0, 5.0, math.nan, 7.0]), np.array([2.0, 3.0, 6.0, 9.0, math.nan])
    assert length_s(spans(start, end)) == 4.0
    assert length_s([]) == 0.0


def test_metrics_become_samples() -> None:
    samples = Samples()
    assert read(PAGE, samples, 1.5) == 1
    row = samples.frame().iloc[0]
    assert (row.t_s, row.instance, row.waiting, row.running, row.used_blocks, row.kv_blocks) == (1.5, "server", 2, 3, 100, 400)
    assert read("process_cpu_seconds_total 1\n", samples, 2.0) == 0 and len(samples) == 1


def test_engines_are_told_apart_by_their_labels() -> None:
    samples = Samples()
    text = 'vllm:num_requests_running{instance="prefill-0"} 1\nvllm:num_requests_running{instance="decode-0"} 4\n'
    assert read(text, samples, 0.0) == 2
    assert samples.frame()[["instance", "running"]].values.tolist() == [["prefill-0", 1], ["decode-0", 4]]


def summary(late_s: float | None, share: float | None, chunk: float | None) -> dict[str, object]:
    return {"send_late_s": {"p99": late_s}, "cpu_share": share, "tokens_per_chunk": chunk}


@pytest.mark.parametrize(
    ("client", "said"),
    [
        (summary(0.001, 0.2, 1.0), ""),
        (summary(None, None, None), ""),
        (summary(0.0061, 0.2, 1.0), "6.1 ms late"),
        (summary(0.001, 0.95, 1.0), "95 % of a core"),
        (summary(0.001, 0.2, 2.5), "2.5 tokens a chunk"),
    ],
)
def test_a_client_that_distorts_is_warned_of(client: dict[str, object], said: str) -> None:
    found = warnings(client)
    assert bool(found) == bool(said) and all(said in line for line in found)
