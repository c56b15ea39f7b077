"""Debian's PostgreSQL, started on a free port for the tests' time, as a user other than root."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.ports import free_port

USER = "postgres"  # PostgreSQL refuses to run as root


def binaries() -> Path:
    """The newest there is; skips, saying so, where there is none."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    if not found:
        pytest.skip("PostgreSQL is not installed: make servers, as root")
    return found[-1]


@contextmanager
def postgres() -> Iterator[str]:
    """The URL of an empty database."""
    bin, port = binaries(), free_port()
    folder = Path(tempfile.mkdtemp(prefix="pdlab-postgres-", dir="/tmp"))
    as_user = _as_user(folder)

    def run(program: str, *words: str) -> None:
        done = subprocess.run([*as_user, str(bin / program), *words], capture_output=True, text=True, cwd=folder, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    cluster = str(folder / "data")
    try:
        run("initdb", "-D", cluster, "-U", "lab", "-A", "trust", "--no-sync", "-E", "UTF8", "--no-locale")
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
        run("pg_ctl", "-D", cluster, "-w", "-l", str(folder / "log"), "-o", options, "start")
        yield f"postgresql://lab@127.0.0.1:{port}/postgres"
    finally:
        if (folder / "data" / "postmaster.pid").exists():
            run("pg_ctl", "-D", cluster, "-m", "immediate", "stop")
        shutil.rmtree(folder, ignore_errors=True)


def _as_user(folder: Path) -> list[str]:
    if os.geteuid() != 0:
        return []
    try:
        user = pwd.getpwnam(USER)
    except KeyError:
        pytest.skip(f"PostgreSQL does not run as root, and there is no user {USER}")
    os.chown(folder, user.pw_uid, user.pw_gid)
    return ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
