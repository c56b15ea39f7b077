"""The router's process and a policy that fails it: clients are told, and so is the operator."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import httpx
import pytest

from pdlab.core import endless_hooks
from pdlab.experiment.experiment import Experiment
from pdlab.real.launch.router import RouterFront, route
from pdlab.real.models.tokenizer import Tokenizer
from pdlab.real.registry import Registry
from pdlab.real.registry.memory import MemoryStore

POLICY = """\
import time
from pdlab import Policy


class Mine(Policy):
    tick_s = 0.05

    def resize(self, cluster):
        {body}
"""


async def _not_ready(experiment: Experiment, front: RouterFront) -> str:
    """What a client is told once nothing is served any more."""
    lines: list[str] = []
    async with Registry(MemoryStore()) as registry:
        routing = asyncio.create_task(route(experiment, front, registry, say=lines.append))
        try:
            async with httpx.AsyncClient() as client:
                while True:
                    await asyncio.sleep(0.05)
                    assert not routing.done(), routing.exception()
                    url = next((line.partition(": ")[2] for line in lines if line.startswith("ready after")), "")
                    if url:
                        answer = await client.get(f"{url.removesuffix('/v1')}/ready")
                        if "policy" in answer.text:
                            assert answer.status_code == 503
                            return answer.text
        finally:
            routing.cancel()
            await asyncio.gather(routing, return_exceptions=True)


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("while True: pass", "does not return: it was cut off after 10 s"),
        ("time.sleep(1e6)", "does not return: it was cut off after 10 s"),
        ("cluster.nothing", "raised AttributeError: "),
    ],
)
@pytest.mark.parametrize("traceback", [False, True])
def test_a_policy_that_fails_ends_the_service_with_its_name(
    body: str,
    what: str,
    traceback: bool,
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(endless_hooks, "LOOK_S", 0.02)
    (tmp_path / "mine.py").write_text(POLICY.format(body=body))
    experiment = Experiment.parse(
        {
            "base_dir": str(tmp_path),
            "model": "llama-3.1-8b",
            "workload": {"source": "azure-conv-2023", "requests": 1, "rate": 1.0},
            "cluster": {"instances": [{"role": "mixed", "hardware": "l4"}]},
            "policy": "mine.py",
        }
    )
    front = RouterFront(name="r0", model="tiny", tokenizer=tokenizer, port=0, drain_s=0.0, traceback=traceback)
    with caplog.at_level(logging.ERROR):
        text = asyncio.run(asyncio.wait_for(_not_ready(experiment, front), 60))
    assert "mine.py:9: policy Mine.resize at t=" in text
    assert what in text
    (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert what in record.getMessage()
    assert bool(record.exc_info) is traceback
