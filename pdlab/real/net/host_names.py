"""Names of hosts as a resolver takes them."""

from __future__ import annotations

MOST_SHOWN = 100  # letters of a name, or a URL with it, in a message


def host_mistake(host: str) -> str:
    """Why no address can be asked for by that name, in words; empty where one can. Source: RFC 1035, 2.3.4."""
    if not host.isprintable() or any(letter.isspace() for letter in host):
        return "a host's name has neither spaces nor control characters"
    try:
        host.encode("idna")
    except UnicodeError:
        return "each part of a host's name, between its dots, has 1 to 63 letters"
    return ""


def shown(url: str) -> str:
    """The URL, cut where it is long."""
    return url if len(url) <= MOST_SHOWN else f"{url[:MOST_SHOWN]}..."


def url_of(host: str, port: int, scheme: str = "http") -> str:
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def wildcard(host: str) -> bool:
    """Every address of this host, and so none that others can be told."""
    return host in ("0.0.0.0", "::", "")
