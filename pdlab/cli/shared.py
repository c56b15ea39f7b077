"""What several commands have in common: consoles, options, and what --traceback shows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import print_exception
from typing import Annotated

import typer
from rich.console import Console

from pdlab.core.types import UsageError
from pdlab.real.net.credentials import from_file
from pdlab.real.net.tls import CA_CERTS

Token = Annotated[
    str,
    typer.Option(
        "--internal-token",
        envvar="PDLAB_INTERNAL_TOKEN",
        callback=from_file("PDLAB_INTERNAL_TOKEN"),
        help="Shared by a cluster's processes (better: PDLAB_INTERNAL_TOKEN_FILE).",
        show_default=False,
    ),
]
CaCerts = Annotated[
    str, typer.Option("--ssl-ca-certs", metavar="PEM", envvar=CA_CERTS, help="Whom to believe.", show_default="the system's")
]
Traceback = Annotated[bool, typer.Option("--traceback", help="Where a policy fails, show all that Python says of it.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="KEY.PATH=VALUE", help="Replace a value of the file.")]
HardwareFile = Annotated[
    Path | None,
    typer.Option("--hardware-file", metavar="FILE", help="Accelerators of your own, which hardware may name.", show_default=False),
]
Jobs = Annotated[int | None, typer.Option("--jobs", help="Processes.", show_default="one for each core")]
RayAddress = Annotated[
    str | None, typer.Option("--ray", metavar="ADDRESS", help="On a Ray cluster: its address, auto, or local.", show_default=False)
]
Force = Annotated[bool, typer.Option("--force", help="Replace another experiment's results, too.")]
out = Console()
err = Console(stderr=True)


@contextmanager
def traced(asked: bool) -> Iterator[None]:
    """A mistake's whole story before its line, where that was asked for."""
    try:
        yield
    except UsageError as error:
        if asked:
            print_exception(error)
        raise
