"""A real cluster under a seeded schedule of troubles: two routers, two prefill and two decode instances, each of which others reach over a
wire that can be cut, their registry's server, and a disk that can be full."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.chaos.schedule import INSTANCES, ROUTER, Trouble, arrivals, schedule
from tests.real.faults.conftest import Asked
from tests.support.clients import Client, Load, load
from tests.support.links import Link, Links
from tests.support.registry_worlds import Server
from tests.support.served_cluster import REST_S, ServedCluster, free_ports, until

ENDED_S = 150.0  # for every request of a round, once the last has come
BACK_S, AGAIN_S = 150.0, 1.0
END_S = 60.0  # for a process that was told to end


@dataclass(slots=True)
class Round:
    """What was done and what came of it. Times are in seconds."""

    troubles: list[Trouble]
    back_s: dict[str, float] = field(default_factory=dict)  # after which who was killed took part again
    clients: list[Client] = field(default_factory=list)
    of_router: list[str] = field(default_factory=list)  # whom each client asked
    hung_up: set[int] = field(default_factory=set)
    began_s: float = 0.0
    took_s: float = 0.0

    def outcomes(self) -> Counter[str]:
        """By client: whole, hung up, the router died, or what the error said."""
        found: Counter[str] = Counter()
        for number, client in enumerate(self.clients):
            if number in self.hung_up:
                found["hung up"] += 1
            elif client.error is not None:
                found[f"error: {client.error['message']}"] += 1
            else:
                found["router died" if client.broken else "whole"] += 1
        return found

    def check(self) -> None:
        """Every request ended whole, or with an error that says why; its tokens are those of one mixed instance, each once. Connections
        break only where the router that was asked died."""
        died = any(one.kind == "router" for one in self.troubles)
        for number, client in enumerate(self.clients):
            if number in self.hung_up:
                assert client.tokens == client.expected[: len(client.tokens)]
                continue
            client.check(whole=False)
            if client.broken:
                assert died and self.of_router[number] == ROUTER, f"request {number} broke off after {len(client.tokens)} tokens"


class Disk:
    """A file system of some megabytes, where the machine lets us mount one."""

    BYTES = 4 << 20

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={self.BYTES}", "dice", str(folder)]
        self.there = os.getuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0

    def fill(self) -> None:
        with contextlib.suppress(OSError), (self.folder / "filler").open("wb", buffering=0) as filler:
            while filler.write(b"x" * 4096):
                pass

    def clear(self) -> None:
        (self.folder / "filler").unlink(missing_ok=True)

    def close(self) -> None:
        if self.there:
            subprocess.run(["umount", "-l", str(self.folder)], capture_output=True, check=False)


class Dice:
    def __init__(self, made: ServedCluster, server: Server, links: Links, disk: Disk, seed: int, rate: float) -> None:
        self.made, self.server, self.disk, self.seed, self.rate = made, server, disk, seed, rate
        self.wires: dict[str, list[Link]] = {}
        self.sessions: set[int] = set()  # of every process ever started
        traced = ["--trace-events", str(disk.folder / "events.jsonl")] if disk.there else []
        made.start("r0", "router", *traced)
        made.start(ROUTER, "router")
        for number, (name, role) in enumerate(INSTANCES.items()):
            afar, (http, kv) = f"127.0.0.{2 + number}", free_ports()
            made.start(name, role, "--advertise", afar, "--port", http, "--kv-port", kv)
            self.wires[name] = [links.open(afar, int(port)) for port in (http, kv)]
        self._note()
        self.joined()

    def joined(self) -> None:
        for router in ("r0", ROUTER):
            self.made.joined(*INSTANCES, router=router)

    async def round(self, number: int, asked: Asked) -> Round:
        """Play it, and wait until all is as it was. Raises AssertionError where a request did not end well, or something is held."""
        played = Round(schedule(self.seed, number, disk=self.disk.there), began_s=time.monotonic())
        rng = random.Random(f"clients {self.seed} {number}")
        async with load(*(self.made.url(router) for router in ("r0", ROUTER))) as clients:
            coming = asyncio.create_task(self._come(clients, played, asked, rng, number))
            striking = [asyncio.create_task(self._strike(one, played, rng)) for one in played.troubles]
            await asyncio.gather(coming, *striking)
            await clients.ended(ENDED_S)
            played.check()
        await asyncio.to_thread(self.joined)
        await asyncio.to_thread(self.made.at_rest, REST_S)
        played.took_s = time.monotonic() - played.began_s
        return played

    async def _come(self, clients: Load, played: Round, asked: Asked, rng: random.Random, number: int) -> None:
        for at_s in arrivals(self.seed, number, self.rate):
            await asyncio.sleep(played.began_s + at_s - time.monotonic())
            which = 0 if rng.random() < 0.8 else 1
            prompt, tokens = rng.choice(asked)
            client = Client(prompt, tokens[: rng.randint(20, len(tokens))]).start(clients.http, clients.urls[which])
            clients.clients.append(client)
            played.clients.append(client)
            played.of_router.append(("r0", ROUTER)[which])

    async def _strike(self, one: Trouble, played: Round, rng: random.Random) -> None:
        await asyncio.sleep(played.began_s + one.at_s - time.monotonic())
        if one.kind in ("kill", "router"):
            await self._killed(one.whom, played)
        elif one.kind == "stop":
            await self._for(one, self.made.processes[one.whom].pause, self.made.processes[one.whom].resume)
        elif one.kind == "cut":
            await self._for(one, lambda: self._cut(one.whom, True), lambda: self._cut(one.whom, False))
        elif one.kind == "disk":
            await self._for(one, self.disk.fill, self.disk.clear)
        elif one.kind == "registry" and one.whom == "stopped":
            await self._for(one, self.server.pause, self.server.resume)
        elif one.kind == "registry":
            await self.server.kill()
            await asyncio.sleep(one.for_s)
            await self.server.restart()
        else:
            running = [n for n, client in enumerate(played.clients) if not (client.done or client.broken) and n not in played.hung_up]
            for number in rng.sample(running, min(int(one.whom), len(running))):
                played.hung_up.add(number)
                await played.clients[number].hang_up()

    async def _killed(self, name: str, played: Round) -> None:
        self.made.processes[name].kill()
        began_s = time.monotonic()
        await asyncio.to_thread(
            until, lambda: self._is_back(name), BACK_S, lambda: f"{name} is back: {self.made.processes[name].said()[-500:]}"
        )
        played.back_s[name] = time.monotonic() - began_s

    def _is_back(self, name: str) -> bool:
        """Start it again where it has ended, as a supervisor of servers does: one that starts while the registry is away ends at once."""
        process = self.made.processes[name]
        if not process.alive:
            self.made.again(name)
            self._note()
            time.sleep(AGAIN_S)
            return False
        return bool(process.url) and (name == ROUTER or self.made.present("r0").get(name) == "ready")

    async def _for(self, one: Trouble, begin: Any, end: Any) -> None:
        begin()
        try:
            await asyncio.sleep(one.for_s)
        finally:
            end()

    def _cut(self, name: str, cut: bool) -> None:
        for wire in self.wires[name]:
            wire.cut = cut

    def _note(self) -> None:
        self.sessions |= {process.popen.pid for process in self.made.processes.values()}

    def end(self) -> None:
        """Tell every process to end. Raises AssertionError where one does not, or leaves a child behind."""
        for process in self.made.processes.values():
            process.popen.send_signal(signal.SIGTERM)
        for name, process in self.made.processes.items():
            until(lambda process=process: not process.alive, END_S, lambda name=name: f"{name} has ended")  # type: ignore[misc]
        until(lambda: not self.left(), 10.0, lambda: f"no process is left, not {self.left()}")

    def left(self) -> list[str]:
        """Command lines of the processes that live on in a session of ours."""
        return [command for session, command in _processes() if session in self.sessions]


def _processes() -> Iterator[tuple[int, str]]:
    """(session, command line) of each that runs."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ESRCH):
                continue
            raise
        if fields[0] != "Z":
            yield int(fields[3]), command


def summed(rounds: Sequence[Round]) -> Mapping[str, Any]:
    """The figures of a whole game."""
    kinds = Counter(one.kind for played in rounds for one in played.troubles)
    outcomes: Counter[str] = sum((played.outcomes() for played in rounds), Counter())
    sent = sum(len(played.clients) for played in rounds)
    return {"rounds": len(rounds), "troubles": dict(kinds), "sent": sent, "outcomes": dict(outcomes.most_common())}
