"""What all fault tests share: a model, and what it makes of some prompts when nothing goes wrong."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.real.registry import conftest as registry
from tests.support.clients import expected
from tests.support.links import Links
from tests.support.served_cluster import NAME, alone, make_model, prompts

PROMPTS, PROMPT_TOKENS, OUTPUT_TOKENS = 24, 300, 200
Asked = list[tuple[list[int], list[int]]]
store = registry.new_server


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("faults") / NAME)


@pytest.fixture(scope="session")
def asked(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Asked:
    """Prompts, and the tokens that one server alone makes of each."""
    given = prompts(PROMPTS, PROMPT_TOKENS)
    with alone(tmp_path_factory.mktemp("alone"), tiny) as url:
        return list(zip(given, asyncio.run(expected(url, given, OUTPUT_TOKENS)), strict=True))


@pytest.fixture(scope="session")
def links() -> Iterator[Links]:
    found = Links()
    yield found
    found.close()


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """No key or token of the developer's own."""
    for name in ("PDLAB_API_KEY", "PDLAB_INTERNAL_TOKEN"):
        if name in os.environ:
            monkeypatch.delenv(name)
