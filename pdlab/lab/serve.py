"""The lab's process."""

from __future__ import annotations

import errno
import socket
from contextlib import closing

import uvicorn

from pdlab.core.types import UsageError
from pdlab.lab.app import create_app
from pdlab.lab.lab import Lab
from pdlab.lab.settings import LabSettings

END_S = 2  # for requests that are under way when the lab ends; what listens is told to go


class LabServer(uvicorn.Server):
    """Says where it is once it listens, and ends what listens for ever when it is to end."""

    def __init__(self, config: uvicorn.Config, lab: Lab) -> None:
        super().__init__(config)
        self.lab = lab

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.lab.feed.close()
        await super().shutdown(sockets)


def serve(settings: LabSettings) -> None:
    """Until SIGTERM or Ctrl-C. Raises UsageError."""
    settings.check()
    with closing(_listening(settings)) as sock:
        lab = Lab.open(settings)
        host, port = f"[{settings.host}]" if ":" in settings.host else settings.host, sock.getsockname()[1]
        print(f"lab: http://{host}:{port}, API at /docs; {settings.jobs} jobs at once, {lab.database.shown}", flush=True)
        config = uvicorn.Config(
            create_app(lab), log_level="warning", access_log=False, timeout_graceful_shutdown=END_S, server_header=False, lifespan="on"
        )
        LabServer(config, lab).run([sock])


def _listening(settings: LabSettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=1024)
    except OSError as error:
        wrong = "--port" if error.errno in (errno.EADDRINUSE, errno.EACCES) else "--host"
        raise UsageError(f"--host {settings.host} --port {settings.port}: {error.strerror or error}; give another {wrong}") from None
