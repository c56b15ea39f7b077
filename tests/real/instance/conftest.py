from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import echo_engine
from tests.support.engine_driver import driver, tiny

__all__ = ["driver", "tiny"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return echo_engine.byte_tokenizer(tmp_path_factory.mktemp("bytes"))
