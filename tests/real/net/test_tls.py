"""https: of a lone server, and of a cluster whose router, instances, registry and operator believe one authority of the test's own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import ssl
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from pdlab.core.types import UsageError
from pdlab.real.net.http import Broken, HttpClient
from pdlab.real.net.tls import Tls
from tests.real.registry.conftest import missing
from tests.real.registry.test_tls import QUOTED, redis
from tests.support import certificates
from tests.support.certificates import Certificates
from tests.support.served_cluster import cluster


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return certificates.make(tmp_path_factory.mktemp("ca"))


async def hello(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
    await writer.drain()
    writer.close()


def test_clients_check_who_answers(certs: Certificates) -> None:
    async def play() -> None:
        heard = 0

        async def count(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal heard
            heard += 1
            await hello(reader, writer)

        ours = Tls(str(certs.cert), str(certs.key)).listening()
        async with (
            await asyncio.start_server(count, "127.0.0.1", 0, ssl=ours) as server,
            await asyncio.start_server(count, "127.0.0.2", 0, ssl=ours) as another,  # whose certificate is for another name
        ):
            named, misnamed = ("https://{}:{}".format(*one.sockets[0].getsockname()) for one in (server, another))
            for url, ca, right in (
                (named, certs.ca, True),
                (named, certs.other_ca, False),
                (named, "", False),
                (misnamed, certs.ca, False),
            ):
                tls = Tls(ca_certs=str(ca))
                with contextlib.closing(HttpClient(url, "of-the-cluster", tls=tls)) as client:
                    if right:
                        assert await client.call(b"GET", b"/health") == (200, b"{}")
                    else:
                        with pytest.raises(Broken, match="cannot connect"):
                            await client.call(b"GET", b"/health")
            assert heard == 1, "who is not believed is told nothing, not even the token"

    asyncio.run(play())


def test_wrong_files_are_told_in_one_line(certs: Certificates, tmp_path: Path) -> None:
    (tmp_path / "no.pem").write_text("no PEM")
    for tls in (
        Tls(str(tmp_path / "no.pem")),
        Tls(str(certs.cert), str(certs.ca.with_suffix(".key"))),
        Tls(str(certs.cert)),
        Tls(keyfile=str(certs.key)),
        Tls(ca_certs=str(tmp_path / "no.pem")),
        Tls(ca_certs=str(tmp_path / "nothing")),
    ):
        with pytest.raises(UsageError, match="--ssl-") as raised:
            tls.check()
        assert "\n" not in str(raised.value)
    Tls(str(certs.cert), str(certs.key), str(certs.ca)).check()


@pytest.mark.slow  # two engines start
def test_a_cluster_whose_every_link_is_encrypted(certs: Certificates, tmp_path: Path, model: Path) -> None:
    """Prefill, decode, migration's export, status and drain over https; the registry is redis over TLS."""
    if reason := missing("redis"):
        pytest.skip(reason)
    with (
        redis(tmp_path, certs) as at,
        cluster(tmp_path, model, f"rediss://me:{QUOTED}@{at}", token="of-the-cluster", policy={"dispatch": "round_robin"}) as made,
    ):
        for name, role in (("router", "router"), ("p", "prefill"), ("d", "decode")):
            made.start(name, role, *certs.options)
        router, deadline_s = made.processes["router"], time.monotonic() + 150
        while not (ready := re.search(r"ready after .*: (https://\S+)/v1", router.said())):
            assert router.alive and time.monotonic() < deadline_s, router.said()
            time.sleep(0.05)
        url = ready[1]
        trusting = ssl.create_default_context(cafile=str(certs.ca))
        with httpx.Client(base_url=url, verify=trusting, timeout=60, headers={"X-PDLab-Token": "of-the-cluster"}) as http:
            while len(rows := http.get("/pdlab/v1/cluster").json().get("rows", [])) < 2 or not http.get("/ready").is_success:
                assert time.monotonic() < deadline_s, rows
                time.sleep(0.05)
            assert all(row["spec"]["url"].startswith("https://") for row in rows)
            asked = {"prompt": list(range(40)), "max_tokens": 6, "temperature": 0, "ignore_eos": True}
            answer = http.post("/v1/completions", json=asked, headers={"X-PDLab-Timeline": "1"})
            assert answer.status_code == 200, answer.text
            timeline = answer.json()["pdlab"]["timeline"]
            assert (timeline["prefill_instance"], timeline["decode_instance"]) == ("p", "d")
            operator = _pdlab("status", "--router", url, "--ssl-ca-certs", str(certs.ca))
            assert operator[0] == 0 and "https://" in operator[1]
            assert _pdlab("status", "--router", url)[0] == 2
            drained = _pdlab("drain", "p", "--registry", made.registry, "--force", "--ssl-ca-certs", str(certs.ca))
            assert drained[0] == 0, drained
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"{url.replace('https:', 'http:')}/health")


def _pdlab(*words: str) -> tuple[int, str]:
    environment = {**os.environ, "PDLAB_INTERNAL_TOKEN": "of-the-cluster", "COLUMNS": "300"}
    ended = subprocess.run([sys.executable, "-m", "pdlab", *words], capture_output=True, text=True, check=False, env=environment)
    return ended.returncode, ended.stdout + ended.stderr
