"""The engine's own process: `python -m pdlab.real.engine.process FD OPTIONS`.

It speaks length-prefixed msgpack over the socket it inherits. One thread takes messages in and one sends them off while a step computes, so
that no step waits for HTTP; between two passes the engine looks whether any have come. Where nothing runs it sleeps on the queue. When the
other end closes, it ends.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from typing import IO

import msgspec

from pdlab.real.engine.messages import AnyToEngine, Broken, Cancel, FromEngine, Ready, Stop, Submit, Tokens
from pdlab.real.engine.options import EngineOptions
from pdlab.types import UsageError


class Link:
    """The engine's end of the socket."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.inbox: queue.SimpleQueue[AnyToEngine] = queue.SimpleQueue()
        self.outbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self.encoder = msgspec.msgpack.Encoder()
        threading.Thread(target=self._read, name="inbox", daemon=True).start()
        self.writer = threading.Thread(target=self._write, name="outbox", daemon=True)
        self.writer.start()

    def _read(self) -> None:
        decoder = msgspec.msgpack.Decoder(AnyToEngine)
        file = self.sock.makefile("rb")
        try:
            while head := file.read(4):
                self.inbox.put(decoder.decode(file.read(int.from_bytes(head, "little"))))
        except (OSError, msgspec.MsgspecError):
            pass
        self.inbox.put(Stop())

    def _write(self) -> None:
        try:
            while raw := self.outbox.get():
                self.sock.sendall(len(raw).to_bytes(4, "little") + raw)
        except OSError:
            self.inbox.put(Stop())

    def send(self, message: FromEngine) -> None:
        self.outbox.put(self.encoder.encode(message))

    def close(self) -> None:
        """Wait until what was sent is on its way."""
        self.outbox.put(b"")
        self.writer.join(5)


def main() -> int:
    """Exits with 0 when told to stop, with 1 when broken."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the HTTP process decides
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    link = Link(socket.socket(fileno=int(sys.argv[1])))
    options = msgspec.json.decode(sys.argv[2], type=EngineOptions)
    try:
        run(link, options)
    except UsageError as error:
        link.send(Broken(str(error), usage=True))
    except Exception as error:
        traceback.print_exc()
        link.send(Broken(f"{type(error).__name__}: {error}"))
    else:
        return 0
    finally:
        link.close()
    return 1


def run(link: Link, options: EngineOptions) -> None:
    """Load, say so, and serve until told to stop."""
    started_s = time.perf_counter()
    from pdlab.kernels.cpu_build import build_all
    from pdlab.real.engine.load import load

    building = threading.Thread(target=build_all, name="kernels")  # while the weights are read
    if options.device == "cpu":
        building.start()
    decisions: IO[bytes] | None = open(options.decisions, "wb") if options.decisions else None  # noqa: SIM115 - closed below
    try:
        loaded = load(options, decisions)
        engine, config = loaded.engine, loaded.config
        if options.device == "cpu":
            building.join()
        engine.runner.warm_up()
        link.send(
            Ready(
                config.name,
                engine.max_tokens,
                config.vocab,
                options.block_tokens,
                engine.scheduler.pool.total,
                str(loaded.device),
                str(loaded.dtype).removeprefix("torch."),
                time.perf_counter() - started_s,
            )
        )

        def emit(outputs: list[Tokens]) -> None:
            link.send(engine.load(outputs, time.monotonic()))

        def interrupted() -> bool:
            return not link.inbox.empty()

        while True:
            while engine.idle or not link.inbox.empty():
                match link.inbox.get():
                    case Submit() as submit:
                        engine.submit(submit, time.monotonic())
                    case Cancel(id, candidate):
                        engine.cancel(id, candidate)
                    case Stop():
                        return
            engine.step(time.monotonic(), emit, interrupted)
    finally:
        if decisions is not None:
            decisions.close()


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # no need to wait for torch's threads
