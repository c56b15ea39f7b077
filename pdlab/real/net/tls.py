"""TLS for what listens, and for what calls: one certificate to show, and whom to believe."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from functools import cache

from pdlab.core.types import UsageError

CA_CERTS = "PDLAB_SSL_CA_CERTS"  # the environment variable of --ssl-ca-certs


@dataclass(frozen=True, slots=True)
class Tls:
    """`certfile` (PEM, with its chain) and `keyfile` are shown to who connects; empty: plain HTTP. `ca_certs` (PEM): whose certificates
    are believed where this process connects to an https, etcds or rediss address; empty: the system's authorities."""

    certfile: str = ""
    keyfile: str = ""
    ca_certs: str = ""

    def check(self) -> None:
        """Raises UsageError with a line for the first thing that is wrong."""
        if self.keyfile and not self.certfile:
            raise UsageError("--ssl-keyfile needs --ssl-certfile: the certificate that it belongs to")
        self.listening()
        if self.ca_certs:
            self.trusting()

    @property
    def scheme(self) -> str:
        return "https" if self.certfile else "http"

    def listening(self) -> ssl.SSLContext | None:
        """For a server's sockets; None: plain."""
        if not self.certfile:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        files = f"--ssl-certfile {self.certfile}" + (f", --ssl-keyfile {self.keyfile}" if self.keyfile else "")
        try:
            context.load_cert_chain(self.certfile, self.keyfile or None, password=_no_password)
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            raise UsageError(f"{files}: {_why(error)}") from None
        return context

    def trusting(self) -> ssl.SSLContext:
        """For connections to others: their certificates and names are checked."""
        return _trusting(self.ca_certs)

    def authorities(self) -> bytes | None:
        """The PEM of `ca_certs`, for who makes a context itself; None: the system's."""
        if not self.ca_certs:
            return None
        self.trusting()
        with open(self.ca_certs, "rb") as file:
            return file.read()


PLAIN = Tls()


@cache
def _trusting(ca_certs: str) -> ssl.SSLContext:
    """One for all connections: to read the system's authorities takes a tenth of a second."""
    try:
        return ssl.create_default_context(cafile=ca_certs or None)
    except (OSError, ValueError) as error:
        raise UsageError(f"--ssl-ca-certs {ca_certs}: {_why(error)}") from None


def _no_password() -> str:
    raise ValueError("the key is encrypted; give one without a passphrase, which only this user can read")


def _why(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return f"no certificate and key in PEM that go together ({error.reason or error})"
    return getattr(error, "strerror", None) or str(error)
