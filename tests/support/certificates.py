"""A certificate authority of the test's own, by the openssl binary."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True, slots=True)
class Certificates:
    """PEM files: the authority's certificate; a server's, for 127.0.0.1 and localhost, and its key; another authority that signed none."""

    ca: Path
    cert: Path
    key: Path
    other_ca: Path

    @property
    def options(self) -> list[str]:
        """Of `pdlab serve`."""
        return ["--ssl-certfile", str(self.cert), "--ssl-keyfile", str(self.key), "--ssl-ca-certs", str(self.ca)]


def make(folder: Path) -> Certificates:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl on the PATH")
    found = Certificates(folder / "ca.pem", folder / "cert.pem", folder / "key.pem", folder / "other-ca.pem")
    for ca in (found.ca, found.other_ca):
        _openssl("req", "-x509", *_new_key(ca.with_suffix(".key")), "-out", str(ca), "-days", "2", "-subj", f"/CN={ca.stem}")
    (folder / "san").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\nextendedKeyUsage=serverAuth,clientAuth\n")
    _openssl("req", *_new_key(found.key), "-out", str(folder / "request"), "-subj", "/CN=127.0.0.1")
    signer = ["-CA", str(found.ca), "-CAkey", str(found.ca.with_suffix(".key")), "-CAcreateserial"]
    _openssl(
        "x509", "-req", "-in", str(folder / "request"), *signer, "-days", "2", "-extfile", str(folder / "san"), "-out", str(found.cert)
    )
    return found


def _new_key(path: Path) -> list[str]:
    return ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", str(path)]


def _openssl(*words: str) -> None:
    subprocess.run(["openssl", *words], check=True, capture_output=True)
