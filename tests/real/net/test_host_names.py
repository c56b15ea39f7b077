"""Hosts that no resolver takes: each command that is given one says so in a line, before it asks anybody."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from pdlab.cli.main import main
from pdlab.core.types import Joined, UsageError
from pdlab.real.net.host_names import host_mistake
from pdlab.real.net.http import HttpClient
from pdlab.real.router.roster import Members
from tests.support.registry_worlds import spec

LONG = "a" * 64
QUICKSTART = str(Path(__file__).parents[3] / "experiments" / "quickstart.yaml")


@pytest.mark.parametrize("host", ["localhost", "a" * 63, "a.b.example.", "::1", "münchen.example", "10.0.0.1"])
def test_a_name_that_can_be_asked_for_is_none_of_them(host: str) -> None:
    assert host_mistake(host) == ""


@pytest.mark.parametrize("host", [LONG, f"{LONG}.example", "a..b", ".b", "a b", "a\0b", "ü" * 63])
def test_a_name_that_cannot_be_is_refused_with_the_rule(host: str) -> None:
    assert host_mistake(host)


@pytest.mark.parametrize("host", [LONG, "a..b", "a" * 2000])
@pytest.mark.parametrize(
    "command",
    [
        ["bench", QUICKSTART, "--requests", "3", "--url", "http://{}:1"],
        ["bench", QUICKSTART, "--requests", "3", "--url", "{}:1/v1"],
        ["calibrate", "--url", "http://{}:1", "--model", "llama-3.1-8b"],
        ["status", "--router", "https://{}"],
        ["drain", "prefill-0", "--router", "http://{}"],
        ["switch", "prefill-0", "decode", "--router", "http://{}:1"],
        ["status", "--registry", "redis://{}:6379"],
        ["status", "--registry", "rediss://user@{}:6379/1"],
        ["status", "--registry", "etcd://{}:2379"],
        ["drain", "prefill-0", "--registry", "etcd://127.0.0.1:1,{}:2379"],
        ["serve", "--role", "router", "--registry", "redis://{}:1"],
        ["serve", "--role", "mixed", "--load-format", "dummy", "--registry", "redis://127.0.0.1:1", "--advertise", "{}"],
        ["serve", "--engine", "vllm", "--role", "mixed", "--registry", "redis://127.0.0.1:1", "--upstream", "http://{}:1"],
    ],
    ids=lambda words: " ".join(word for word in words if word.startswith("--") or word[0] in "bcdst")[:60],
)
def test_a_command_says_so_in_a_line(
    command: list[str], host: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PDLAB_REGISTRY", raising=False)
    with pytest.raises(SystemExit) as exit:
        main([word.format(host) for word in command])
    said = capsys.readouterr().err.strip()
    assert exit.value.code == 2
    assert len(said.splitlines()) == 1 and said.startswith("error: ") and "1 to 63 letters" in said, said
    assert len(said) < 400


def test_a_name_beyond_ascii_is_sent_as_resolvers_write_it() -> None:
    assert b"Host: xn--mnchen-3ya.example:81\r\n" in HttpClient("http://münchen.example:81").request(b"GET", b"/")


def test_an_instance_that_registers_with_such_a_url_takes_no_part() -> None:
    bad = msgspec.structs.replace(spec("p"), url=f"http://{LONG}:1")
    members = Members()
    assert members.hear(Joined(bad)) == []
    assert "1 to 63 letters" in members.known["p"].refusal


def test_a_client_is_refused_before_it_connects() -> None:
    with pytest.raises(UsageError, match="1 to 63 letters"):
        HttpClient(f"http://{LONG}")
