"""`pdlab switch`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from pdlab.cli.operator import Force, InstanceName, NoWait, Registry, RouterUrl, asked_of
from pdlab.cli.shared import CaCerts, Token
from pdlab.core.types import Role, UsageError, nearest
from pdlab.real.router import status as cluster


def switch(
    instance: InstanceName,
    role: Annotated[str, typer.Argument(help="prefill, decode or mixed.", show_default=False)],
    registry: Registry = None,
    router: RouterUrl = None,
    token: Token = "",
    ca_certs: CaCerts = "",
    no_wait: NoWait = False,
    force: Force = False,
) -> None:
    """Let an instance finish what it has, and change its role."""

    if role not in list(Role):
        raise UsageError(f"role {role!r} is not one of {', '.join(Role)}{nearest(role, list(Role))}")
    registry, token, tls = asked_of(registry, router, token, ca_certs)

    async def ask(views: Any) -> str:
        return str(await cluster.switch(views, instance, Role(role), token, force=force, wait=not no_wait, tls=tls))

    cluster.run(cluster.command(registry, router, token, ask, tls))
