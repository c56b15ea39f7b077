from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.real.launch.test_all import Cluster, running
from tests.support.otlp import Collector, collecting


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    with collecting() as made:
        yield made


@pytest.fixture(scope="session")
def observed(model: Path, collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """1P1D that tells the collector of each request."""
    policy = {"dispatch": "prefix_aware", "handoff": "least_kv"}
    with running(Cluster(tmp_path_factory.mktemp("observed"), model, policy, options=["--otlp-endpoint", collector.url])) as made:
        yield made
