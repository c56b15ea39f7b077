"""A process that holds an instance or campaigns, and says so: `holder.py URL instance|leader NAME LEASE_S`."""

from __future__ import annotations

import asyncio
import sys
import time

from pdlab.core.types import InstanceSpec, Role
from pdlab.real.registry import open_registry


async def main(url: str, what: str, name: str, lease_s: float) -> None:
    registry = await open_registry(url, timeout_s=60.0)
    if what == "instance":
        held = await registry.register(InstanceSpec(name=name, role=Role.DECODE, kv_blocks=10), lease_s=lease_s)
        print(held.incarnation, flush=True)
        await asyncio.sleep(60)
    leadership = await registry.elect(name, lease_s=lease_s)
    await leadership.changed()
    was, asked_s = False, 0.0
    while True:
        before_s, asked_s = asked_s, time.monotonic()
        leads = leadership.is_leader
        if leads != was or asked_s - before_s > 0.1:
            print(asked_s, int(leads), leadership.fencing, flush=True)
        was = leads
        await asyncio.sleep(0.002)


asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4])))
