"""`pdlab drain`."""

from __future__ import annotations

from typing import Any

from pdlab.cli.operator import Force, InstanceName, NoWait, Registry, RouterUrl, asked_of
from pdlab.cli.shared import CaCerts, Token
from pdlab.real.router import status as cluster


def drain(
    instance: InstanceName,
    registry: Registry = None,
    router: RouterUrl = None,
    token: Token = "",
    ca_certs: CaCerts = "",
    no_wait: NoWait = False,
    force: Force = False,
) -> None:
    """Let an instance finish what it has, and leave."""
    registry, token, tls = asked_of(registry, router, token, ca_certs)

    async def ask(views: Any) -> str:
        return str(await cluster.drain(views, instance, token, force=force, wait=not no_wait, tls=tls))

    cluster.run(cluster.command(registry, router, token, ask, tls))
