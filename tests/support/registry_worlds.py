"""The three worlds that the contract runs in: virtual time over memory, real servers on free ports."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

from pdlab.core.types import InstanceSpec, Report, Role, UsageError
from pdlab.real.registry import Registry, open_registry
from pdlab.real.registry.memory import MemoryStore
from pdlab.real.registry.observer import WatchEvent
from tests.support.ports import free_port
from tests.support.virtual import VirtualLoop

Main = Callable[[], Coroutine[Any, Any, None]]


def spec(name: str = "p0", role: Role = Role.PREFILL, **more: Any) -> InstanceSpec:
    return InstanceSpec(name=name, role=role, kv_blocks=1000, url=f"http://127.0.0.1/{name}", **more)


class RegistryWorld:
    """A store that several registries, each as if in a process of its own, share."""

    url = ""
    lease_s = 1.0  # of what shall fall silent, or renew itself a few times meanwhile
    exact = False  # time passes as it should

    def __init__(self) -> None:
        self.opened: list[Registry] = []

    def run(self, main: Main) -> None:
        """Warnings of the loop (tasks that died unseen) are failures."""
        with asyncio.Runner(loop_factory=self.loop) as runner:
            troubles: list[str] = []
            runner.get_loop().set_exception_handler(lambda _, context: troubles.append(str(context)))
            runner.run(self.within(main))
            assert not troubles, troubles

    async def within(self, main: Main) -> None:
        try:
            await asyncio.wait_for(main(), 300)
        finally:
            await asyncio.gather(*(registry.close() for registry in self.opened))
            self.opened = []

    async def open(self) -> Registry:
        self.opened.append(await self.connect())
        return self.opened[-1]

    def loop(self) -> asyncio.AbstractEventLoop:
        return asyncio.new_event_loop()

    async def connect(self) -> Registry:
        return await open_registry(self.url, timeout_s=60.0)

    async def kill(self) -> None:
        raise NotImplementedError

    async def restart(self, *, wipe: bool = False) -> None:
        raise NotImplementedError

    async def scribble(self, key: str, value: bytes) -> None:
        """Write what a broken or hostile peer might."""
        raise NotImplementedError


class MemoryWorld(RegistryWorld):
    exact = True

    def __init__(self) -> None:
        super().__init__()
        self.store: MemoryStore | None = None

    def loop(self) -> asyncio.AbstractEventLoop:
        return VirtualLoop()

    async def connect(self) -> Registry:
        clock = asyncio.get_running_loop().time
        self.store = self.store or _Shared(clock)
        return Registry(self.store, clock)

    async def kill(self) -> None:
        assert self.store is not None
        self.store.stop()

    async def restart(self, *, wipe: bool = False) -> None:
        assert self.store is not None
        self.store.start(wipe=wipe)

    async def scribble(self, key: str, value: bytes) -> None:
        assert self.store is not None
        self.store.reports[key] = value
        self.store._publish(key, value)


class _Shared(MemoryStore):
    async def close(self) -> None:
        pass


class Server(RegistryWorld):
    """A real server; `kill -9` and SIGSTOP are what they say."""

    binary = ""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.ports = [free_port(), free_port()]
        self.process: subprocess.Popen[bytes] | None = None
        self.namespace = "pdlab"

    @property
    def url(self) -> str:  # type: ignore[override]
        return f"{self.binary.partition('-')[0]}://127.0.0.1:{self.ports[0]}?namespace={self.namespace}"

    def command(self) -> list[str]:
        raise NotImplementedError

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(self.command(), cwd=self.folder, stdout=log, stderr=log)

    async def ready(self, within_s: float = 60.0) -> None:
        end, patience_s = time.monotonic() + within_s, 1.0
        while True:
            try:
                registry = await open_registry(self.url, timeout_s=patience_s)
            except UsageError:
                if time.monotonic() > end:
                    raise
                if self.process is not None and self.process.poll() is not None:  # its port was not free yet
                    self.start()
                await asyncio.sleep(0.05)
                patience_s *= 1.5
            else:
                await registry.close()
                return

    async def kill(self) -> None:
        self.stop()

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    async def restart(self, *, wipe: bool = False) -> None:
        if wipe:
            shutil.rmtree(self.folder)
        self.start()
        await self.ready()

    async def spoil_count(self, key: str, value: bytes) -> None:
        raise NotImplementedError

    def pause(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)


class Etcd(Server):
    binary = "etcd"
    lease_s = 1.5  # etcd counts whole seconds, and looks for ended leases every 0.5 s; its default timeouts grant 2 s at least

    def command(self) -> list[str]:
        client, peer = (f"http://127.0.0.1:{port}" for port in self.ports)
        return [
            *("etcd", "--data-dir", str(self.folder / "etcd"), "--listen-client-urls", client, "--advertise-client-urls", client),
            *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", f"default={peer}"),
            *("--auto-compaction-retention", "10m", "--heartbeat-interval", "50", "--election-timeout", "500"),
        ]

    async def scribble(self, key: str, value: bytes) -> None:
        store: Any = self.opened[0].store
        await store.kv.put(store.live + key, value)

    async def spoil_count(self, key: str, value: bytes) -> None:
        store: Any = self.opened[0].store
        await store.kv.put(store.numbers + key, value)


class Redis(Server):
    binary = "redis-server"
    lease_s = 1.5

    def command(self) -> list[str]:
        """By its default it may acknowledge what it has not written yet, when the disk is slow, and lose that with a kill."""
        kept = ["--dir", str(self.folder), "--appendonly", "yes", "--appendfsync", "always"]
        return ["redis-server", "--port", str(self.ports[0]), "--bind", "127.0.0.1", *kept]

    def keep(self) -> None:
        """What it has now, for `set_back`."""
        shutil.copytree(self.folder, self.folder.with_suffix(".kept"))

    def set_back(self) -> None:
        """It is without what it has written since."""
        shutil.rmtree(self.folder)
        self.folder.with_suffix(".kept").rename(self.folder)

    async def scribble(self, key: str, value: bytes) -> None:
        store: Any = self.opened[0].store
        await store._run("put(ARGV[1], 'value', ARGV[2]) publish('put', ARGV[1], ARGV[2])", key, value)

    async def spoil_count(self, key: str, value: bytes) -> None:
        store: Any = self.opened[0].store
        await store.client.set(store.numbers + key, value)


SERVERS: dict[str, type[Server]] = {"etcd": Etcd, "redis": Redis}


class Seen:
    """A watcher that keeps what it saw, and when."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.events: list[WatchEvent] = []
        self.times: list[float] = []
        self.news = asyncio.Event()
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async with contextlib.aclosing(self.registry.watch()) as events:
            async for event in events:
                self.events.append(event)
                self.times.append(asyncio.get_running_loop().time())
                self.news.set()

    async def until(self, *events: WatchEvent, within_s: float = 60.0) -> float:
        """Wait until all have been seen; when the last of them was."""
        async with asyncio.timeout(within_s):
            while not all(event in self.events for event in events):
                self.news.clear()
                await self.news.wait()
        return max(self.times[self.events.index(event)] for event in events)

    def of(self, *kinds: type) -> list[WatchEvent]:
        return [event for event in self.events if isinstance(event, kinds)]


@contextlib.asynccontextmanager
async def watching(registry: Registry) -> AsyncIterator[Seen]:
    seen = Seen(registry)
    try:
        yield seen
    finally:
        if seen.task.done():
            seen.task.result()
        seen.task.cancel()
        await asyncio.wait([seen.task])


class Process:
    """A registry's user in a process of its own (`holder.py`), to be killed or paused."""

    def __init__(self, url: str, *arguments: str) -> None:
        script = Path(__file__).with_name("holder.py")
        self.popen = subprocess.Popen([sys.executable, str(script), url, *arguments], stdout=subprocess.PIPE, text=True)

    async def line(self) -> str:
        assert self.popen.stdout is not None
        return (await asyncio.to_thread(self.popen.stdout.readline)).strip()

    def signal(self, number: int) -> None:
        self.popen.send_signal(number)

    def end(self) -> str:
        """Kill it; what it still had to say."""
        self.popen.kill()
        rest, _ = self.popen.communicate()
        return rest


def report(waiting: int, **more: Any) -> Report:
    return Report("", taken_s=1.5, waiting=waiting, **more)
