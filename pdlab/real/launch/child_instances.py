"""The instances of `pdlab serve --role all`: a process each, started, started again when one dies, and ended with the cluster."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable, Mapping, Sequence

from pdlab.core.types import UsageError
from pdlab.real.registry.child_registry import answer
from pdlab.real.registry.memory import MemoryStore

AGAIN_S, MOST_AGAIN_S = 1.0, 60.0  # before one is started again; twice as long each time while it gets no place
END_S = 10.0  # for one that was told to end
Command = Callable[[int], Sequence[str]]  # of the socket's number


class Children:
    """`add` them, watch `failed`, and in the end `await close()`. `say` tells the operator."""

    def __init__(self, store: MemoryStore, *, environment: Mapping[str, str] | None = None, say: Callable[[str], None] = print) -> None:
        self.store, self.say = store, say
        self.environment = {**os.environ, **(environment or {})}
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()  # a UsageError: one that is needed never started
        self._tasks: dict[str, asyncio.Task[None]] = {}

    @property
    def names(self) -> set[str]:
        """Of all that were ever started."""
        return set(self._tasks)

    def add(self, name: str, command: Command, *, needed: bool = True) -> None:
        """Start one, and keep it running until it has drained (status 0), or the cluster closes. `needed`: that it does not start is the
        user's mistake, and the cluster's end."""
        self._tasks[name] = asyncio.create_task(self._keep(name, command, needed), name=f"child {name}")

    async def close(self) -> None:
        """End them, and wait until they have."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        self.failed.cancel()

    async def _keep(self, name: str, command: Command, needed: bool) -> None:
        again_s = AGAIN_S
        while True:
            joined, status = await self._live(command)
            if status == 0 and joined:
                self.say(f"{name} has drained and ended")
                return
            how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"has ended with status {status}"
            if joined:
                needed, again_s = False, AGAIN_S
            if needed:
                if not self.failed.done():
                    self.failed.set_exception(UsageError(f"instance {name} {how} before it was ready; what it said is above"))
                return
            self.say(f"{name} {how}: starting it again" + ("" if joined else f" in {again_s:g} s"))
            await asyncio.sleep(again_s)
            if not joined:
                again_s = min(2 * again_s, MOST_AGAIN_S)

    async def _live(self, command: Command) -> tuple[bool, int]:
        """One life: did it join, and its exit status."""
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.create_subprocess_exec(
                *command(theirs.fileno()),
                pass_fds=[theirs.fileno()],
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                env=self.environment,
                process_group=0,  # Ctrl-C is for the parent, which drains first
            )
        answering = asyncio.create_task(answer(self.store, ours))
        try:
            status = await process.wait()
            return await answering > 0, status
        finally:
            await _end(process)
            answering.cancel()
            await asyncio.gather(answering, return_exceptions=True)


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.terminate()
        try:
            async with asyncio.timeout(END_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
