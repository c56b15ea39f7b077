"""What `pdlab status`, `drain` and `switch` have in common: which cluster is meant, and who asks."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from pdlab.real.net.credentials import kept_token, registry_url
from pdlab.real.net.tls import Tls

Registry = Annotated[
    str | None, typer.Option("--registry", metavar="URL", help="etcd://, etcds://, redis:// or rediss://.", show_default=False)
]
RouterUrl = Annotated[str | None, typer.Option("--router", metavar="URL", help="A running router, as of --role all.", show_default=False)]
NoWait = Annotated[bool, typer.Option("--no-wait", help="Return at once.")]
Force = Annotated[bool, typer.Option("--force", help="Even where nobody else has its role.")]
InstanceName = Annotated[str, typer.Argument(metavar="INSTANCE", show_default=False)]


def asked_of(registry: str | None, router: str | None, token: str, ca_certs: str) -> tuple[str | None, str, Tls]:
    """The registry, or the environment's; the token, or that of this user's own cluster behind `router`; whom to believe."""
    tls = Tls(ca_certs=ca_certs)
    tls.check()
    if router is None:
        registry = registry_url(registry or os.environ.get("PDLAB_REGISTRY") or None)
    return registry, token or (kept_token(router) if router else ""), tls
