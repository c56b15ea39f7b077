from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from tests.support import echo_engine
from tests.support.api_world import JSON, ApiWorld, served
from tests.support.waiting import until


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return echo_engine.byte_tokenizer(tmp_path_factory.mktemp("bytes"))


@pytest.fixture(scope="session")
def world(folder: Path) -> Iterator[ApiWorld]:
    """Shared by the tests of the session; nothing may be left in it."""
    with served(folder) as found:
        yield found
        until(found.at_rest)


@pytest.fixture(scope="session")
def client(world: ApiWorld) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{world.url}/v1", api_key="none", max_retries=0, timeout=60) as found:
        yield found


@pytest.fixture(scope="session")
def http(world: ApiWorld) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=world.url, timeout=60, headers=JSON) as found:
        yield found
