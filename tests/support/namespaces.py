"""Network namespaces on a bridge of this machine, an address each."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator

import pytest

WORKER = os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")  # tests that run side by side have networks of their own
NET = f"10.213.{77 + int(WORKER)}"
BRIDGE, HOME = f"pdlab{WORKER}-br", f"{NET}.1"


def ip(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], check=check, capture_output=True, text=True)


def space(name: str) -> str:
    return f"pdlab{WORKER}-{name}"


def inside(name: str) -> tuple[str, ...]:
    """What a command begins with to run there."""
    return "ip", "netns", "exec", space(name)


@contextlib.contextmanager
def spaces(names: Iterable[str]) -> Iterator[dict[str, str]]:
    """A bridge here, and behind it a namespace of each name; their addresses. Skips the test where that cannot be."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    addresses = {name: f"{NET}.{number}" for number, name in enumerate(names, 2)}
    try:
        with contextlib.ExitStack() as stack:
            ip("link", "add", BRIDGE, "type", "bridge")
            stack.callback(ip, "link", "del", BRIDGE, check=False)
            ip("addr", "add", f"{HOME}/24", "dev", BRIDGE)
            ip("link", "set", BRIDGE, "up")
            for name, address in addresses.items():
                ip("netns", "add", space(name))
                stack.callback(ip, "netns", "del", space(name), check=False)
                ip("link", "add", space(name), "type", "veth", "peer", "name", "eth0", "netns", space(name))
                ip("link", "set", space(name), "master", BRIDGE, "up")
                for command in (f"addr add {address}/24 dev eth0", "link set eth0 up", "link set lo up"):
                    ip("-n", space(name), *command.split())
            yield addresses
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
