"""What a lab is started with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from pdlab.core.types import UsageError
from pdlab.lab.foreman import JobLimits
from pdlab.real.net.credentials import MAKES_ONE, loopback, without_password
from pdlab.search.pool import check_jobs, usable_cores

TOKEN = "PDLAB_LAB_TOKEN"
GIB = 1 << 30
LEAST_TOKEN = 16  # characters


@dataclass(frozen=True, slots=True, kw_only=True)
class LabSettings:
    """`routers` and `registries` are URLs by the names of their clusters; `router_token` is theirs."""

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
    most_uploads_bytes: float = 10 * GIB
    limits: JobLimits = field(default_factory=JobLimits)
    routers: Mapping[str, str] = field(default_factory=dict)
    registries: Mapping[str, str] = field(default_factory=dict)
    router_token: str = ""

    @property
    def url(self) -> str:
        return self.db or f"sqlite:///{self.folder / 'lab.db'}"

    def check(self) -> None:
        """Raises UsageError."""
        check_jobs(self.jobs)
        if self.token and len(self.token) < LEAST_TOKEN:
            raise UsageError(
                f"{TOKEN}: {len(self.token)} characters can be guessed: give {LEAST_TOKEN} or more; "
                f"{MAKES_ONE.format(name=TOKEN)} makes one"
            )
        for name in self.registries:
            if name in self.routers:
                raise UsageError(f"--registry {name}: a --router has that name, too; write --registry OTHER=URL")
        if not loopback(self.host) and not self.token:
            raise UsageError(
                f"--host {self.host}: others reach it, so it needs a token: set {TOKEN}, or {TOKEN}_FILE, and send it as Bearer; "
                f"{MAKES_ONE.format(name=TOKEN)} makes one"
            )
        bounds = (
            ("--max-queued", self.most_queued),
            ("--job-time-s", self.limits.time_s),
            ("--job-silence-s", self.limits.silence_s),
            ("--job-gib", self.limits.rss_bytes / GIB),
            ("--uploads-gib", self.most_uploads_bytes / GIB),
        )
        for name, value in bounds:
            if not 0 < value < math.inf:
                raise UsageError(f"{name} {value:g}: give a number above 0")


def routers_of(texts: Sequence[str]) -> dict[str, str]:
    """URLs by the names of their clusters, as NAME=URL says, or the URL's host and port. Raises UsageError."""
    return _named(texts, "--router", ("http", "https"), "http://HOST:PORT")


def registries_of(texts: Sequence[str]) -> dict[str, str]:
    """As `routers_of`, of registries. Raises UsageError."""
    return _named(texts, "--registry", ("etcd", "etcds", "redis", "rediss"), "etcd://HOST:PORT or redis://HOST:PORT")


def _named(texts: Sequence[str], option: str, schemes: Sequence[str], form: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in texts:
        name, equals, url = text.partition("=")
        if not equals or "://" in name:
            name, url = "", text
        shown = without_password(url)
        try:
            parts = urlsplit(url)
            usable = parts.scheme in schemes and bool(parts.hostname) and ("," in parts.netloc or (parts.port or 1) > 0)
        except ValueError:
            usable = False
        if not usable:
            raise UsageError(f"{option} {shown}: write {form}, or NAME={form.partition(' ')[0]}")
        name = name or parts.netloc.rpartition("@")[2]
        if name in found or "/" in name:
            raise UsageError(f"{option} {shown}: {name!r} is {'there twice' if name in found else 'no name'}; write NAME={shown}")
        found[name] = url.rstrip("/")
    return found
