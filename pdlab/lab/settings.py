"""What a lab is started with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from pdlab.core.types import UsageError
from pdlab.lab.foreman import JobLimits
from pdlab.real.net.credentials import MAKES_ONE, loopback
from pdlab.search.pool import usable_cores

TOKEN = "PDLAB_LAB_TOKEN"
GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class LabSettings:
    """`routers` are URLs by the names of their clusters; `router_token` is theirs."""

    folder: Path = Path("out/lab")
    db: str = ""
    host: str = "127.0.0.1"
    port: int = 8800
    jobs: int = field(default_factory=usable_cores)
    ray: str | None = None
    token: str = ""
    allow_code: bool = False
    most_queued: int = 1000
    most_body_bytes: int = 1 << 20
    most_upload_bytes: int = 1 << 28
    limits: JobLimits = field(default_factory=JobLimits)
    routers: Mapping[str, str] = field(default_factory=dict)
    router_token: str = ""

    @property
    def url(self) -> str:
        return self.db or f"sqlite:///{self.folder / 'lab.db'}"

    def check(self) -> None:
        """Raises UsageError."""
        if self.jobs < 1:
            raise UsageError(f"--jobs {self.jobs}: it takes a process at least; write --jobs 1 or more")
        if not loopback(self.host) and not self.token:
            raise UsageError(
                f"--host {self.host}: others reach it, so it needs a token: set {TOKEN}, or {TOKEN}_FILE, and send it as Bearer; "
                f"{MAKES_ONE.format(name=TOKEN)} makes one"
            )
        bounds = (
            ("--max-queued", self.most_queued),
            ("--job-time-s", self.limits.time_s),
            ("--job-gib", self.limits.rss_bytes / GIB),
        )
        for name, value in bounds:
            if not 0 < value < math.inf:
                raise UsageError(f"{name} {value:g}: give a number above 0")


def routers_of(texts: Sequence[str]) -> dict[str, str]:
    """URLs by the names of their clusters, as NAME=URL says, or the URL's host and port. Raises UsageError."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, url = text.partition("=")
        if not equals or "://" in name:
            name, url = "", text
        try:
            parts = urlsplit(url)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        except ValueError:
            usable = False
        if not usable:
            raise UsageError(f"--router {text}: write http://HOST:PORT, or NAME=http://HOST:PORT")
        name = name or parts.netloc.rpartition("@")[2]
        if name in found or "/" in name:
            raise UsageError(f"--router {text}: {name!r} is {'there twice' if name in found else 'no name'}; write NAME={url}")
        found[name] = url.rstrip("/")
    return found
