from __future__ import annotations

from pathlib import Path

import pytest

from tests.real.api import stand_in
from tests.real.engine.conftest import tiny

__all__ = ["folder", "tiny"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stand_in.byte_tokenizer(tmp_path_factory.mktemp("bytes"))
