from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import served


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served.make(tmp_path_factory.mktemp("tiny"))
