"""What instances and routers meet in, etcd and Redis, and the clients that ask them."""

from __future__ import annotations

import re

from pdlab.experiment.imports.programs import LeftOut, Program, Sets, whole, words

OWN = "etcd's own; pdlab asks it where it listens for clients"


def url_ports(text: str) -> tuple[int, ...]:
    """Of a comma-separated list of URLs."""
    return tuple(int(found[1]) for part in words(text) if (found := re.search(r":(\d+)/?$", part)))


ETCD = Program(
    "etcd",
    "store",
    ("etcd",),
    {
        "--listen-client-urls": Sets("client_ports", url_ports),
        "--advertise-client-urls": Sets("advertised_ports", url_ports),
        "--listen-peer-urls": LeftOut(OWN),
        "--initial-advertise-peer-urls": LeftOut(OWN),
        "--initial-cluster": LeftOut(OWN),
        "--data-dir": LeftOut(OWN),
        "--name": LeftOut(OWN),
    },
    defaults={"client_ports": (2379,)},
)
REDIS = Program(
    "redis-server",
    "store",
    ("redis-server",),
    {"--port": Sets("client_ports", lambda text: (whole(text),)), "--bind": LeftOut("redis' own"), "--daemonize": LeftOut("redis' own")},
    defaults={"client_ports": (6379,)},
    positional="configuration",
)
CURL = Program(
    "curl",
    "client",
    ("curl",),
    {
        **dict.fromkeys(("-d", "--data", "--data-raw", "--json"), Sets("body")),
        **dict.fromkeys(("-H", "--header", "-X", "--request", "-m", "--max-time", "-o", "--output"), LeftOut("a request's own")),
        **dict.fromkeys(("-s", "-N", "-i", "-sS", "-v", "--silent", "--no-buffer"), LeftOut("a request's own", switch=True)),
    },
    positional="url",
)
PROGRAMS = (ETCD, REDIS, CURL)
