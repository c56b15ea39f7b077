"""`pdlab nics`: this machine's RDMA NICs and NPUs' own, as launch scripts want them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from pdlab.core.types import UsageError
from pdlab.real.transfer import rdma

PLACES = ("gpu", "cpu")


def nics(
    place: Annotated[
        str, typer.Argument(metavar="[DEVICE]", help="gpu: for each GPU the NIC nearest to it; cpu: for each socket the fastest NIC on it.")
    ] = "gpu",
    sysfs: Annotated[Path, typer.Option(help="Where the kernel lists devices.", hidden=True)] = rdma.SYSFS,
    hccn: Annotated[Path, typer.Option(help="Where NPUs' addresses are.", hidden=True)] = rdma.HCCN,
) -> None:
    """Print KVCACHE_RDMA_NICS= and UCX_NET_DEVICES= of this machine, and its NPUs' addresses: export $(pdlab nics gpu)."""
    if place not in PLACES:
        raise UsageError(f"nics {place!r} is not one of {', '.join(PLACES)}")
    lines = rdma.assignments(place, os.environ, sysfs, hccn)
    if not lines:
        print(f"no RDMA NIC of {sysfs}/class/infiniband is active, and {hccn} names no NPU", file=sys.stderr)
        raise typer.Exit(1)
    print("\n".join(lines))
