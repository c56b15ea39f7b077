from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from pdlab.real.models.tokenizer import Tokenizer
from tests.support import served

for waiting in ("connect", "read", "write", "pool"):  # for calls that name no time-out: 5 s are few on a busy machine
    setattr(httpx._config.DEFAULT_TIMEOUT_CONFIG, waiting, 60.0)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served.make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tokenizer(model: Path) -> Tokenizer:
    return Tokenizer.load(model)


@pytest.fixture(scope="session")
def url(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that all tests of the session share; what they leave behind would show in the last one's figures."""
    experiment = tmp_path_factory.mktemp("experiment") / "tiny.yaml"
    experiment.write_text(
        json.dumps(
            {
                "model": str(model),
                "workload": {"source": "azure-conv-2023", "requests": 10, "rate": 1.0},
                "cluster": {"instances": [{"role": "mixed", "hardware": "h100-sxm"}]},
                "engine": {"block_tokens": 4, "kv_blocks": 600, "max_seqs": 32, "max_batch_tokens": 256},
            }
        )
    )
    with served.server(model, str(experiment), "--served-model-name", "tiny", "--allowed-origins", "https://page.example") as (found, _):
        yield found


@pytest.fixture(scope="session")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as found:
        yield found


@pytest.fixture(scope="session")
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=120, headers={"Content-Type": "application/json"}) as found:
        yield found
