"""Who starts while the registry is away waits for it, and says so."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pdlab.core.types import UsageError
from pdlab.real.registry import Registry
from pdlab.real.registry.memory import MemoryStore
from pdlab.real.registry.store import NameHeld, RegistrySilent
from pdlab.real.registry.wait import patiently
from tests.support import served
from tests.support.registry_worlds import SERVERS, MemoryWorld, Server, spec
from tests.support.served_cluster import Process, until

NewServer = Callable[[str], Server]


def played(answers: list[Exception | str], within_s: float = 60.0, each_s: float = 0.0) -> tuple[str, float, list[str]]:
    """What came of it, after how long, and what was said."""
    said: list[str] = []
    came: list[tuple[str, float]] = []

    async def main() -> None:
        now = asyncio.get_running_loop().time
        began_s = now()

        async def attempt() -> str:
            await asyncio.sleep(each_s)
            answer = answers.pop(0) if len(answers) > 1 else answers[0]
            if isinstance(answer, Exception):
                raise answer
            return answer

        try:
            of_it = await patiently(attempt, within_s, said.append)
        except UsageError as error:
            of_it = f"{type(error).__name__}: {error}"
        came.append((of_it, now() - began_s))

    MemoryWorld().run(main)
    return *came[0], said


def test_it_waits_till_the_registry_answers_and_says_both_once() -> None:
    silent = RegistrySilent("etcd://a:1 does not answer")
    found, took_s, said = played([silent] * 10 + ["joined"])
    assert found == "joined" and 0.0 < took_s < 10.0
    assert said == ["waiting for the registry, 60 s at most: etcd://a:1 does not answer", "the registry answers"]
    assert played(["joined"]) == ("joined", 0.0, [])


@pytest.mark.parametrize("each_s", [0.0, 5.0])
def test_it_ends_with_one_line_when_that_time_is_over(each_s: float) -> None:
    found, took_s, said = played([RegistrySilent("etcd://a:1 does not answer")], each_s=each_s)
    assert found == "RegistrySilent: etcd://a:1 does not answer; it was waited for 60 s (--registry-wait-s)"
    assert 60.0 <= took_s <= 65.0 and len(said) == 1
    assert played([RegistrySilent("away")], within_s=0.0) == ("RegistrySilent: away", 0.0, [])


def test_what_waiting_does_not_mend_is_told_at_once() -> None:
    assert played([UsageError("a wrong password")]) == ("UsageError: a wrong password", 0.0, [])
    assert played([NameHeld("p0 is taken")]) == ("NameHeld: p0 is taken", 0.0, [])


def test_a_name_may_be_held_by_an_attempt_whose_answer_did_not_come() -> None:
    """Until that one's lease runs out."""
    said: list[str] = []

    class Mute(MemoryStore):
        async def claim(self, *arguments: object) -> None:  # type: ignore[override]
            await super().claim(*arguments)  # type: ignore[arg-type]
            del Mute.claim
            await asyncio.sleep(60.0)

    async def main() -> None:
        now = asyncio.get_running_loop().time
        registry, began_s = Registry(Mute(now), now), now()
        place = await patiently(lambda: registry.register(spec(), lease_s=3.0), 60.0, said.append)
        assert place.incarnation == 2 and now() - began_s < 10.0
        await place.drop()

    MemoryWorld().run(main)
    assert len(said) == 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served.make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Starts `pdlab serve` with these options."""
    started: list[Process] = []

    def new(*options: str) -> Process:
        started.append(Process([sys.executable, "-m", "pdlab", "serve", *options], tmp_path / f"{len(started)}.log"))
        return started[-1]

    yield new
    for process in started:
        process.kill()


@pytest.mark.parametrize("kind", SERVERS)
def test_instances_and_routers_that_start_before_their_registry_join_when_it_is_there(
    kind: str, model: Path, new_server: NewServer, start: Callable[..., Process]
) -> None:
    server = new_server(kind)
    server.stop()
    serve = ("--model", str(model), "--port", "0", "--threads", "1", "--registry", server.url)
    processes = [start(*serve, "--role", role, "--instance-name", role) for role in ("mixed", "router")]
    hasty = start(*serve, "--role", "router", "--instance-name", "hasty", "--registry-wait-s", "0.5")
    for process in (*processes, hasty):
        until(lambda: "waiting for the registry" in process.said() or not process.alive, 120.0, process.said)  # noqa: B023
    assert hasty.popen.wait(120) == 2, hasty.said()
    (line,) = [line for line in hasty.said().splitlines() if "it was waited for" in line]
    assert f"no {kind} server answers there" in line and "Traceback" not in hasty.said()
    assert all(process.alive for process in processes)
    server.start()
    for process in processes:
        process.ready()
    until(lambda: "mixed is ready" in processes[1].said(), 60.0, processes[1].said)
