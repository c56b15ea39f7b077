"""Secrets: from a file or the environment rather than the command line, which every user of a host can read; and where an operator's
commands find the token that `pdlab serve --role all` has made for itself."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote, urlsplit, urlunsplit

from pdlab.core.types import UsageError

MOST_SECRET_BYTES = 8192
REGISTRY_PASSWORD = "PDLAB_REGISTRY_PASSWORD"
MAKES_ONE = """export {name}=$(python3 -c "import secrets; print(secrets.token_hex(32))")"""
S = TypeVar("S", str, str | None)


def secret(name: str, value: str | None) -> str | None:
    """`value`, from an option or the variable `name`; where there is none, what the file holds that NAME_FILE names. Raises UsageError
    where it cannot be read, or both variables are set."""
    path = os.environ.get(f"{name}_FILE", "")
    if not path:
        return value
    if value:
        if os.environ.get(name) == value:
            raise UsageError(f"both {name} and {name}_FILE are set: remove one of them")
        return value  # an option goes before the environment
    return read(path, f"{name}_FILE")


def read(path: str, what: str) -> str:
    """A file's only line."""
    try:
        with open(path, "rb") as file:
            raw = file.read(MOST_SECRET_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{what} {path}: {error.strerror or error}") from None
    text = raw.rstrip(b"\r\n").decode("ascii", errors="replace")
    if not text or len(raw) > MOST_SECRET_BYTES or not (text.isascii() and text.isprintable()):
        raise UsageError(f"{what} {path}: it must hold one line of printable ASCII, at most {MOST_SECRET_BYTES} bytes")
    return text


def from_file(name: str) -> Callable[[S], S]:
    """What a command-line option of that variable calls with its value."""
    return lambda value: secret(name, value) or value


def registry_url(url: S) -> S:
    """With the password of PDLAB_REGISTRY_PASSWORD, or its _FILE, where it names none. Raises UsageError."""
    return with_password(secret("PDLAB_REGISTRY", url) or url)


def with_password(url: S) -> S:
    """As `registry_url`, of one that was found elsewhere."""
    password = secret(REGISTRY_PASSWORD, os.environ.get(REGISTRY_PASSWORD) or None)
    if not url or not password or url.startswith(("memory:", "fd:")):
        return url
    try:
        parts = urlsplit(url)
    except ValueError:
        return url  # no URL: refused where it is opened
    user, colon, _ = parts.netloc.rpartition("@")[0].partition(":")
    if colon:
        raise UsageError(f"registry {without_password(url)}: a password is in it, and another in {REGISTRY_PASSWORD}: remove one of them")
    netloc = f"{user}:{quote(password, safe='')}@{parts.netloc.rpartition('@')[2]}"
    return urlunsplit(parts._replace(netloc=netloc))


def without_password(url: str) -> str:
    """To be shown."""
    scheme, separator, rest = url.partition("://") if "://" in url else ("", "", url)
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"


def loopback(host: str) -> bool:
    """Only this host's processes reach it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@contextmanager
def kept(port: int, token: str) -> Iterator[None]:
    """Where this user's `pdlab drain` and `switch` find the token of the cluster whose router listens at that port of this host."""
    path = _folder() / f"token-{port}"
    beside = path.with_name(f".{path.name}-{os.getpid()}")
    with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "w", encoding="ascii") as file:
        file.write(token)
    beside.replace(path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if path.read_text(encoding="ascii") == token:
                path.unlink()


def kept_token(url: str) -> str:
    """Of the router at that URL, where it runs on this host and as this user; else empty."""
    try:
        parts = urlsplit(url)
        if not loopback(parts.hostname or ""):
            return ""
        return read(str(_folder() / f"token-{parts.port}"), "token")
    except (ValueError, UsageError):
        return ""


def _folder() -> Path:
    """That only this user can read. Raises UsageError where there can be none."""
    found = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()) / f"pdlab-{os.geteuid()}"
    try:
        found.mkdir(mode=0o700, exist_ok=True)
        there = found.lstat()
    except OSError as error:
        raise UsageError(f"{found}: {error.strerror}; give --internal-token, or set XDG_RUNTIME_DIR to a folder of yours") from None
    if not stat.S_ISDIR(there.st_mode) or there.st_uid != os.geteuid() or there.st_mode & 0o077:
        raise UsageError(f"{found} is not a folder that you alone can read: remove it, or give --internal-token")
    return found
