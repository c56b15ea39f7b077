"""The HTTP process's end: starts the engine process, sends it requests, and hands each request its tokens."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys

import msgspec

from pdlab.real.engine.messages import AnyFromEngine, Broken, Cancel, Ready, Step, Stop, Submit, ToEngine, Tokens
from pdlab.real.engine.options import EngineOptions
from pdlab.types import UsageError


class EngineClient:
    """An engine in a process of its own. `await EngineClient.start(options)`, then `submit`, `cancel`, and in the end `await close()`."""

    def __init__(self, process: subprocess.Popen[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.process = process
        self.ready: Ready
        self.load = Step([])
        self.down: str | None = None
        self._reader, self._writer = reader, writer
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(AnyFromEngine)
        self._queues: dict[int, tuple[asyncio.Queue[Tokens], set[int]]] = {}
        self._listening: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, options: EngineOptions) -> EngineClient:
        """Start the process and wait until its model is loaded. Raises UsageError where the engine finds a mistake of the user's."""
        ours, theirs = socket.socketpair()
        for sock in (ours, theirs):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)
        command = [sys.executable, "-m", "pdlab.real.engine.process", str(theirs.fileno()), msgspec.json.encode(options).decode()]
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env={**os.environ, **_environment(options)})
        theirs.close()
        reader, writer = await asyncio.open_connection(sock=ours, limit=1 << 24)
        client = cls(process, reader, writer)
        try:
            first = await client._receive()
        except BaseException:
            await client.close()
            raise
        if isinstance(first, Ready):
            client.ready = first
            client._listening = asyncio.create_task(client._listen())
            return client
        await client.close()
        if isinstance(first, Broken) and first.usage:
            raise UsageError(first.reason)
        reason = first.reason if isinstance(first, Broken) else f"exit status {process.returncode}"
        raise UsageError(f"the engine process did not start: {reason}")

    def submit(self, submit: Submit, arriving: asyncio.Queue[Tokens] | None = None) -> asyncio.Queue[Tokens]:
        """All candidates' tokens arrive in the queue, each one's last with `finish` set. Several requests may share a given queue."""
        arriving = asyncio.Queue() if arriving is None else arriving
        if self.down is not None:
            for index in range(submit.sampling.best_of):
                arriving.put_nowait(Tokens(submit.id, index, 0, [], "error", error=self.down))
            return arriving
        self._queues[submit.id] = arriving, set(range(submit.sampling.best_of))
        self._send(submit)
        return arriving

    def cancel(self, id: int, candidate: int = -1) -> None:
        """Drop a request or one of its candidates; its last tokens, with finish "abort", still arrive."""
        if id in self._queues and self.down is None:
            self._send(Cancel(id, candidate))

    async def close(self) -> None:
        """End the process: in order, and where it does not answer within 5 s, or still loads, by force."""
        if self._listening is None:
            self.process.kill()
        else:
            self._listening.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._listening
        if self.process.poll() is None:
            with contextlib.suppress(OSError):
                self._send(Stop())
        self._fail("the engine was stopped")
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()
        try:
            await asyncio.to_thread(self.process.wait, 5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            await asyncio.to_thread(self.process.wait)

    def _send(self, message: ToEngine) -> None:
        raw = self._encoder.encode(message)
        self._writer.write(len(raw).to_bytes(4, "little") + raw)

    async def _receive(self) -> AnyFromEngine | None:
        try:
            head = await self._reader.readexactly(4)
            message: AnyFromEngine = self._decoder.decode(await self._reader.readexactly(int.from_bytes(head, "little")))
            return message
        except (asyncio.IncompleteReadError, ConnectionError):
            await asyncio.to_thread(self.process.wait)
            return None

    async def _listen(self) -> None:
        while isinstance(message := await self._receive(), Step):
            self.load = message
            for tokens in message.outputs:
                self._deliver(tokens)
        if isinstance(message, Broken):
            self._fail(f"the engine has failed: {message.reason}")
        else:
            self._fail(f"the engine process has ended with status {self.process.returncode}")

    def _deliver(self, tokens: Tokens) -> None:
        known = self._queues.get(tokens.id)
        if known is None:
            return
        arriving, open_candidates = known
        if tokens.finish is not None:
            open_candidates.discard(tokens.candidate)
            if not open_candidates:
                del self._queues[tokens.id]
        arriving.put_nowait(tokens)

    def _fail(self, reason: str) -> None:
        if self.down is None:
            self.down = reason
        for id, (arriving, open_candidates) in self._queues.items():
            for index in sorted(open_candidates):
                arriving.put_nowait(Tokens(id, index, 0, [], "error", error=reason))
        self._queues.clear()


def _environment(options: EngineOptions) -> dict[str, str]:
    """For the engine process: OpenMP threads that wait asleep after a while, since an engine rarely has the machine to itself."""
    found = {"TOKENIZERS_PARALLELISM": "false"}
    if options.threads:
        found["OMP_NUM_THREADS"] = str(options.threads)
    return found
