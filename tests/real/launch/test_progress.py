"""What a start says while it lasts."""

from __future__ import annotations

import pytest

from pdlab.real.launch import instance as serve
from pdlab.real.launch.instance import Progress


def test_a_stage_that_lasts_is_said_again_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now_s = 100.0
    monkeypatch.setattr(serve.time, "monotonic", lambda: now_s)
    progress = Progress(100.0, "decode-0")
    progress.begin("loading weights")
    now_s = 105.0
    progress.still()
    now_s = 110.0
    progress.still()
    progress.still()
    assert capsys.readouterr().err.splitlines() == ["decode-0: loading weights (0.0 s)", "decode-0: still loading weights (10.0 s)"]
