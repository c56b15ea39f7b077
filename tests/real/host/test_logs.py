"""What `pdlab serve` says: levels, time stamps, JSON lines."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re

import pytest

from pdlab.core.types import UsageError
from pdlab.real.api.app import create_app
from pdlab.real.api.http_server import bind, serve
from pdlab.real.host import logs
from pdlab.real.launch.instance import Progress

STAMP = r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
log = logging.getLogger("pdlab.real.test")


def test_every_line_bears_the_time_and_the_level(capsys: pytest.CaptureFixture[str]) -> None:
    with logs.configured("info", "text") as say:
        say("first\nsecond")
        log.warning("%s takes no part", "d")
        log.debug("not told")
        Progress(0.0, "p").begin("loading weights")
    said = capsys.readouterr()
    assert re.fullmatch(rf"{STAMP} first\n{STAMP} second\n", said.out)
    assert re.fullmatch(rf"{STAMP} WARNING pdlab.real.test: d takes no part\n{STAMP} p: loading weights \(\S+ s\)\n", said.err)


@pytest.mark.parametrize(
    ("level", "told"),
    [("debug", "debug info warning error"), ("info", "info warning error"), ("warning", "warning error"), ("error", "error")],
)
def test_a_level_hides_what_is_below_it(level: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with logs.configured(level, "text") as say:
        for one in ("debug", "info", "warning", "error"):
            log.log(logging.getLevelName(one.upper()), one)
        say("said")
    out, err = capsys.readouterr()
    assert [line.split()[-1] for line in err.splitlines()] == told.split()
    assert ("said" in out) is (level in ("debug", "info"))


def test_json_lines_are_one_object_each(capsys: pytest.CaptureFixture[str]) -> None:
    with logs.configured("info", "json", instance="d-0") as say:
        say('ready: "http://a"\nand more')
        try:
            raise ValueError("x\ny")
        except ValueError:
            log.exception("%s failed", "it")
        logging.getLogger("asyncio").error("a library's own")
        Progress(0.0, "p").begin("loading weights")
    out, err = capsys.readouterr()
    first, second = map(json.loads, out.splitlines())
    assert first.keys() == {"time", "level", "logger", "message", "instance", "pid"} and re.fullmatch(STAMP, first["time"])
    assert (first["level"], first["message"], second["message"], first["instance"]) == ("info", 'ready: "http://a"', "and more", "d-0")
    broken, other, progress = map(json.loads, err.splitlines())
    assert (broken["level"], broken["logger"], broken["message"]) == ("error", "pdlab.real.test", "it failed")
    assert "ValueError: x\ny" in broken["exception"] and other["logger"] == "asyncio" and "loading" in progress["message"]


def test_a_mistake_is_a_json_line_too_and_ends_it_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, logs.configured("info", "json"):
        raise UsageError("one\ntwo")
    assert ended.value.code == 2
    assert [json.loads(line)["message"] for line in capsys.readouterr().err.splitlines()] == ["one", "two"]
    with pytest.raises(UsageError), logs.configured("info", "text"):
        raise UsageError("the command line prints it")


def test_it_leaves_logging_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    before = logging.getLogger().handlers[:], logging.getLogger("pdlab").level, logging.getLogger("pdlab").handlers[:]
    with logs.configured("debug", "json"):
        assert logging.getLogger("pdlab").isEnabledFor(logging.DEBUG)
    assert before == (logging.getLogger().handlers[:], logging.getLogger("pdlab").level, logging.getLogger("pdlab").handlers[:])


@pytest.mark.parametrize(
    ("level", "form", "message"),
    [
        ("warn", "text", "--log-level 'warn' is not one of debug, info, warning, error; nearest is warning"),
        ("info", "jsn", "nearest is json"),
    ],
)
def test_an_unknown_word_names_the_nearest(level: str, form: str, message: str) -> None:
    with pytest.raises(UsageError, match=message), logs.configured(level, form):
        pass


def test_children_and_the_engine_process_take_it_from_their_environment(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("PDLAB_LOG_LEVEL", "PDLAB_LOG_FORMAT", "PDLAB_LOG_INSTANCE")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    with logs.configured("debug", "json", instance="p"):
        told = {name: os.environ[name] for name in names}
    assert told == dict(zip(names, ("debug", "json", "p"), strict=True)) and not any(name in os.environ for name in names)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    with logs.inherited():
        log.debug("from the engine")
    line = json.loads(capsys.readouterr().err)
    assert (line["message"], line["instance"], line["level"]) == ("from the engine", "p", "debug")
    monkeypatch.delenv("PDLAB_LOG_LEVEL")
    with logs.inherited():
        assert logging.getLogger("pdlab").level == logging.NOTSET


def test_uvicorn_has_no_lines_of_its_own_form_while_logging_is_configured(capsys: pytest.CaptureFixture[str]) -> None:
    with logs.configured("info", "json"), bind("127.0.0.1", 0) as sock:
        app = create_app(None)

        async def play() -> None:
            serving = asyncio.create_task(serve(app, sock))
            await asyncio.sleep(0.05)
            logging.getLogger("uvicorn.error").error("from uvicorn")
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)

        asyncio.run(play())
    (line,) = [json.loads(line) for line in capsys.readouterr().err.splitlines() if "uvicorn" in line]
    assert (line["logger"], line["message"]) == ("uvicorn.error", "from uvicorn")
