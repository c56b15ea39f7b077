"""A process for the tests of `serve`: python -m tests.support.served_echo FOLDER PORT DRAIN_S WAITS.

Says `bound PORT`, `ready`. Its engine stands still after a request's first token, until SIGUSR1; where WAITS is 1 it loads only then."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

from pdlab.core.types import UsageError
from pdlab.real.api.app import create_app
from pdlab.real.api.http_server import bind, serve
from pdlab.real.api.service import Service
from pdlab.real.models.tokenizer import Tokenizer
from tests.support.echo_engine import EchoEngine, Sequence


class Held(EchoEngine):
    """Until it is let go, a request gets its first token, and no more."""

    def __init__(self) -> None:
        super().__init__(step_s=0.01)
        self.let_go = asyncio.Event()

    def _advance(self, one: Sequence) -> None:
        if not one.made or self.let_go.is_set():
            super()._advance(one)


async def main(folder: Path, port: int, drain_s: float, waits: bool) -> int:
    sock = bind("127.0.0.1", port)
    print("bound", sock.getsockname()[1], flush=True)
    app, engine = create_app(), Held()
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, engine.let_go.set)

    async def load() -> None:
        if waits:
            await engine.let_go.wait()
        app.state.service = Service(engine, Tokenizer.load(folder), "tiny")
        print("ready", flush=True)

    loading = asyncio.create_task(load())
    left = await serve(app, sock, drain_s=drain_s)
    loading.cancel()
    print("left", left, flush=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4] == "1")))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
