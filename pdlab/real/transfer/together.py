"""Parts of one transfer, under way at once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from pdlab.real.transfer.result import TransferResult


async def all_of(parts: Sequence[Awaitable[TransferResult]], end: Callable[[], None] = lambda: None) -> TransferResult:
    """What becomes of all of them. Where one fails the others are ended, by `end` too; when this returns, or raises CancelledError, nothing
    of any writes any more."""
    if not parts:
        return TransferResult("done")
    if len(parts) == 1:
        return await parts[0]
    futures = [asyncio.ensure_future(part) for part in parts]
    pending, cancelled = set(futures), False

    def stop() -> None:
        for future in pending:
            if isinstance(future, asyncio.Task):
                future.cancel()
        end()

    while pending:
        try:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            cancelled = True
            stop()
            continue
        if pending and any(part.cancelled() or part.result().status != "done" for part in done):
            stop()
    if cancelled:
        raise asyncio.CancelledError
    return together([TransferResult("failed", reason="cancelled") if part.cancelled() else part.result() for part in futures])


def together(parts: Sequence[TransferResult]) -> TransferResult:
    """Of several mistakes the first that is not of another's making."""
    failed = [part for part in parts if part.status != "done"]
    if failed:
        return next((part for part in failed if "cancelled" not in part.reason), failed[0])
    ways = {way for part in parts for way in part.transport.split(", ") if way}
    return TransferResult("done", sum(part.bytes for part in parts), max(part.seconds for part in parts), "", ", ".join(sorted(ways)))
