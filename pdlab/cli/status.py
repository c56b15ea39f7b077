"""`pdlab status`."""

from __future__ import annotations

from typing import Annotated

import typer

from pdlab.cli.operator import Registry, RouterUrl, asked_of
from pdlab.cli.shared import CaCerts, Token, out
from pdlab.real.router import status as cluster


def status(
    registry: Registry = None,
    router: RouterUrl = None,
    token: Token = "",
    ca_certs: CaCerts = "",
    watch: Annotated[bool, typer.Option("--watch", help="Again each second, until Ctrl-C.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As an object, not as a table; with --watch one a line.")] = False,
) -> None:
    """A cluster's instances: their roles, load and KV, who was refused and why, and which router leads."""
    registry, token, tls = asked_of(registry, router, token, ca_certs)
    show = cluster.show_json if as_json else cluster.show
    cluster.run(show(registry, router, token, out, watch, tls))
