"""The source of measured transfers, in a process of its own: `python -m pdlab.proof.calibrate.peer JSON`. Its first line is its descriptor;
for each line `LEASE BLOCKS` it offers so many blocks, and says so. It ends with its standard input."""

from __future__ import annotations

import asyncio
import base64
import sys

import msgspec

from pdlab.proof.calibrate.transfer import Kv, endpoint

_read = msgspec.json.Decoder(Kv).decode


async def serve(kv: Kv) -> None:
    async with endpoint(kv, "calibrate-source") as source:
        print(base64.b64encode(source.descriptor()).decode(), flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            lease, blocks = line.split()
            source.offer(lease, range(int(blocks)))
            print(lease, flush=True)


if __name__ == "__main__":
    asyncio.run(serve(_read(sys.argv[1])))
