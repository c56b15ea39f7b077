"""Which web pages may ask from a browser (CORS), by vLLM's options."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware

from pdlab.core.types import UsageError

EXPOSED = ("X-Request-Id", "Retry-After")


NAMES = msgspec.json.Decoder(list[str])


@dataclass(frozen=True, slots=True)
class Cors:
    """No origins: no page may."""

    allowed_origins: tuple[str, ...] = ()
    allowed_methods: tuple[str, ...] = ("*",)
    allowed_headers: tuple[str, ...] = ("*",)
    allow_credentials: bool = False

    def apply(self, app: Starlette) -> None:
        if self.allowed_origins:
            app.add_middleware(
                CORSMiddleware,
                allow_origins=self.allowed_origins,
                allow_methods=self.allowed_methods,
                allow_headers=self.allowed_headers,
                allow_credentials=self.allow_credentials,
                expose_headers=EXPOSED,
            )


NO_PAGES = Cors()


def cors_of(origins: str, methods: str, headers: str, credentials: bool) -> Cors:
    """From the command line. Raises UsageError on what cannot be an origin."""
    found = _names("--allowed-origins", origins)
    for origin in found:
        if origin != "*" and not origin.startswith(("http://", "https://")):
            raise UsageError(f"--allowed-origins {origin}: an origin is like https://example.org, or *")
        if origin.count("/") > 2:
            raise UsageError(f"--allowed-origins {origin}: an origin has no path, leave out what follows its host")
    if credentials and not found:
        raise UsageError("--allow-credentials needs --allowed-origins")
    return Cors(found, _names("--allowed-methods", methods), _names("--allowed-headers", headers), credentials)


def _names(option: str, text: str) -> tuple[str, ...]:
    """Names with commas between them, or as vLLM takes them, a JSON list."""
    if not text.lstrip().startswith("["):
        return tuple(name for part in text.split(",") if (name := part.strip()))
    try:
        return tuple(NAMES.decode(text))
    except msgspec.MsgspecError:
        raise UsageError(f"{option} {text}: give names with commas between them, or a JSON list") from None
