"""A start while the registry is away: whoever needs it waits for it, for a while."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from pdlab.core.types import UsageError
from pdlab.real.registry.store import NameHeld, RegistrySilent

RETRY_S = 0.5
T = TypeVar("T")


async def patiently(attempt: Callable[[], Awaitable[T]], within_s: float, say: Callable[[str], None]) -> T:
    """What `attempt` brings, which is tried again where the registry does not answer, for `within_s` in all. `say` is told that it waits,
    and that it need not any more. Raises RegistrySilent when that time is over, and whatever else `attempt` raises; a name may be held by
    an attempt whose answer did not come, though."""
    now = asyncio.get_running_loop().time
    until_s, waits = now() + within_s, False
    while True:
        try:
            found = await attempt()
        except (RegistrySilent, NameHeld) as trouble:
            if isinstance(trouble, NameHeld) and not waits:
                raise
            left_s = until_s - now()
            if left_s <= 0:
                raise _last(trouble, within_s) from None
            if not waits:
                say(f"waiting for the registry, {within_s:g} s at most: {trouble}")
            waits = True
            await asyncio.sleep(min(RETRY_S, left_s))
        else:
            if waits:
                say("the registry answers")
            return found


def _last(trouble: UsageError, within_s: float) -> UsageError:
    return type(trouble)(f"{trouble}; it was waited for {within_s:g} s (--registry-wait-s)") if within_s else trouble
