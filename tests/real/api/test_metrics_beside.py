"""/metrics at a port of its own."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest

from pdlab.core.types import UsageError
from pdlab.real.api.app import create_app
from pdlab.real.api.http_server import metrics_beside
from pdlab.real.api.service import Service
from pdlab.real.models.tokenizer import Tokenizer
from tests.support.echo_engine import EchoEngine, byte_tokenizer
from tests.support.ports import free_port


def _names(page: str) -> list[str]:
    return [line for line in page.splitlines() if line.startswith("# TYPE")]


def test_it_has_the_servers_metrics_and_health_and_nothing_else(tmp_path: Path) -> None:
    async def play() -> None:
        app, port = create_app(), free_port()
        async with metrics_beside(app, "127.0.0.1", port), httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
            assert (await http.get("/metrics")).status_code == 503
            app.state.service = service = Service(EchoEngine(), Tokenizer.load(byte_tokenizer(tmp_path)), "tiny", api_key="secret")
            page = await http.get("/metrics")
            assert _names(page.text) == _names(service.metrics.exposition().decode()) and page.headers["content-type"].startswith(
                "text/plain; version=0.0.4"
            )
            assert (await http.get("/health")).status_code == 200
            for path in ("/v1/models", "/pdlab/v1/instance", "/"):
                assert (await http.get(path)).status_code == 404
            with pytest.raises(UsageError, match=f"port {port} on 127.0.0.1 is in use"):
                async with metrics_beside(app, "127.0.0.1", port):
                    pass
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"http://127.0.0.1:{port}/metrics")
        async with metrics_beside(app, "127.0.0.1", 0):
            pass

    asyncio.run(play())
