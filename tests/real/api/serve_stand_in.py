"""A process for the tests of `serve`: python -m tests.real.api.serve_stand_in FOLDER PORT DRAIN_S LOAD_S. Says `bound PORT`, `ready`."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from pdlab.real.api.app import create_app
from pdlab.real.api.serve import bind, serve
from pdlab.real.api.service import Service
from pdlab.real.engine.tokenizer import Tokenizer
from pdlab.types import UsageError
from tests.real.api.stand_in import EchoEngine


async def main(folder: Path, port: int, drain_s: float, load_s: float) -> int:
    sock = bind("127.0.0.1", port)
    print("bound", sock.getsockname()[1], flush=True)
    app = create_app()

    async def load() -> None:
        await asyncio.sleep(load_s)
        app.state.service = Service(EchoEngine(step_s=0.01), Tokenizer.load(folder), "tiny")
        print("ready", flush=True)

    loading = asyncio.create_task(load())
    left = await serve(app, sock, drain_s=drain_s)
    loading.cancel()
    print("left", left, flush=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4]))))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
