"""What goes wrong, as OpenAI's error objects: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.responses import Response

encode = msgspec.json.Encoder().encode


class ApiError(Exception):
    """An answer that is an error. `param` names the field at fault; `retry_after_s` asks the client to come again; `cause` tells a router
    why KV did not come."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = "",
        retry_after_s: int = 0,
        cause: str = "",
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.kind = kind or ("invalid_request_error" if status < 500 else "server_error")
        self.retry_after_s = retry_after_s
        self.cause = cause

    def body(self) -> dict[str, Any]:
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error | ({"cause": self.cause} if self.cause else {})}

    def response(self) -> Response:
        headers = {"Retry-After": str(self.retry_after_s)} if self.retry_after_s else {}
        if self.status == 503:
            headers["Connection"] = "close"
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return Response(encode(self.body()), self.status, headers, media_type="application/json")


def bad(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The client's mistake."""
    return ApiError(400, message, param=param, code=code)


def overloaded(why: str, wait_s: int) -> ApiError:
    """There is too much to do now."""
    message = f"{why}: try again in {wait_s} s"
    return ApiError(429, message, kind="rate_limit_error", code="overloaded", retry_after_s=wait_s)


def draining() -> ApiError:
    return ApiError(503, "the server is draining and takes no new requests", code="draining", retry_after_s=5)


def fenced() -> ApiError:
    """Routers then know that this incarnation is over, though the registry may still show it."""
    return ApiError(503, "the instance has lost its place in the cluster", code="lease_lost", retry_after_s=1)


def loading() -> ApiError:
    return ApiError(503, "the model is being loaded", code="loading", retry_after_s=5)
