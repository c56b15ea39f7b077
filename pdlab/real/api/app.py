"""The OpenAI API over an engine: routes, keys, request ids, and what an operator asks (health, readiness, metrics)."""

from __future__ import annotations

import hmac
import logging
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from pdlab import __version__
from pdlab.real.api.answer import Answer
from pdlab.real.api.backend import Routing
from pdlab.real.api.chat import chat_job
from pdlab.real.api.completions import completion_job
from pdlab.real.api.cors import NO_PAGES, Cors
from pdlab.real.api.errors import ApiError, encode, loading
from pdlab.real.api.metrics import EXPOSITION
from pdlab.real.api.requests import label
from pdlab.real.api.service import GenerateJob, Service
from pdlab.real.api.tokenize import detokenized, tokenized
from pdlab.real.net.wire import TIMELINE_HEADER, TOKEN_HEADER, TRACE_HEADERS

log = logging.getLogger(__name__)

Handler = Callable[[Service, Request], Awaitable[Response]]
Route = tuple[str, str, Handler]
Guard = Callable[[Service, Request], None]
MOST_READING_BYTES = 256 << 20  # of all bodies that have not come whole
MOST_REQUEST_ID = 256  # characters
SESSION_HEADER, TENANT_HEADER = "X-Session-ID", "X-User-ID"  # what they say counts before the body


def create_app(service: Service | None = None, more: Sequence[Route] = (), cors: Cors = NO_PAGES) -> FastAPI:
    """Without a service it says that it is loading, until `app.state.service` is set to one. `more` routes: an instance's."""
    app = _App(title="pdlab", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    cors.apply(app)
    app.state.service = service
    for method, path, handler in (*ROUTES, *more):
        app.router.add_route(path, _Endpoint(app, handler, GUARDS.get(path.split("/")[1])), methods=[method])  # type: ignore[arg-type]
    app.router.add_route("/ready", _Plain(app, _ready), methods=["GET"])  # type: ignore[arg-type]
    app.router.add_route("/version", _Plain(app, _version), methods=["GET"])  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, _http_error)
    return app


class _App(FastAPI):
    """Without FastAPI's own layer around each request, which closes what dependencies opened: no route here has any."""

    def build_middleware_stack(self) -> ASGIApp:
        return Starlette.build_middleware_stack(self)


class _Plain:
    """An ASGI route that may be asked while the model loads."""

    def __init__(self, app: FastAPI, handler: Callable[[Service | None], Response]) -> None:
        self.app, self.handler = app, handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = self.handler(self.app.state.service)
        response.headers["X-Request-Id"] = _request_id(Request(scope))
        await response(scope, receive, send)


class _Endpoint:
    """An ASGI route; what its handler raises is answered in OpenAI's shape, unless the answer has begun."""

    def __init__(self, app: FastAPI, handler: Handler, guard: Guard | None) -> None:
        self.app, self.handler, self.guard = app, handler, guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        request.state.request_id = name = _request_id(request)
        service: Service | None = self.app.state.service
        try:
            _check_request_id(request)
            if service is None:
                raise loading()
            if self.guard is not None:
                self.guard(service, request)
            if request.method == "POST":
                _check_is_json(request)
            response = await self.handler(service, request)
            response.headers["X-Request-Id"] = name
            await response(scope, receive, send)
        except ApiError as error:
            if service is not None and error.status in (429, 503):
                service.metrics.rejected(error.status)
            await _send(error, name, scope, receive, send)
        except ClientDisconnect:
            return  # in the middle of what it sent: nobody waits for an answer
        except Exception:
            log.exception("%s %s failed", request.method, request.url.path)
            await _send(ApiError(500, "the server has failed on this request; its log says more"), name, scope, receive, send)


async def _send(error: ApiError, request_id: str, scope: Scope, receive: Receive, send: Send) -> None:
    response = error.response()
    response.headers["X-Request-Id"] = request_id
    await response(scope, receive, send)


async def _completions(service: Service, request: Request) -> Response:
    service.check_reads()
    return _answer(service, await completion_job(service, await read(request), _of_the_cluster(service, request)), request)


async def _chat(service: Service, request: Request) -> Response:
    service.check_reads()
    return _answer(service, await chat_job(service, await read(request), _of_the_cluster(service, request)), request)


def _answer(service: Service, job: GenerateJob, request: Request) -> Answer:
    session, tenant = (label(name, request.headers.get(name, "")) for name in (SESSION_HEADER, TENANT_HEADER))
    if session or tenant:
        job = replace(job, ask=replace(job.ask, session=session or job.ask.session, tenant=tenant or job.ask.tenant))
    if service.traces is not None:
        above, state = (request.headers.get(name, "") for name in TRACE_HEADERS)
        job = replace(job, ask=replace(job.ask, trace=(above, state)))
    return Answer(service, job, request.state.request_id, request.headers.get(TIMELINE_HEADER) == "1")


async def _models(service: Service, request: Request) -> Response:
    most = service.engine.ready.max_tokens
    card = {"id": service.model, "object": "model", "created": service.created, "owned_by": "pdlab", "max_model_len": most}
    if (name := request.path_params.get("name")) is not None:
        service.check_model(name)
        return as_json(card)
    return as_json({"object": "list", "data": [card]})


async def _tokenize(service: Service, request: Request) -> Response:
    return as_json(await tokenized(service, await read(request)))


async def _detokenize(service: Service, request: Request) -> Response:
    return as_json(detokenized(service, await read(request)))


async def _health(service: Service, request: Request) -> Response:
    if service.engine.down is not None:
        raise ApiError(503, service.engine.down, code="engine_down")
    return Response(status_code=200)


async def _metrics(service: Service, request: Request) -> Response:
    return Response(service.metrics.exposition(), media_type=EXPOSITION)


async def _targets(service: Service, request: Request) -> Response:
    """For Prometheus' http_sd_configs: a router's instances."""
    if not isinstance(service.engine, Routing):
        raise ApiError(404, "only a router has targets; scrape this server's own /metrics")
    return as_json(service.engine.targets())


def _ready(service: Service | None) -> Response:
    reasons = ["loading"] if service is None else service.not_ready()
    return as_json({"ready": not reasons, "reasons": reasons}, 503 if reasons else 200)


def _version(service: Service | None) -> Response:
    return as_json({"version": __version__})


ROUTES: tuple[Route, ...] = (
    ("POST", "/v1/completions", _completions),
    ("POST", "/v1/chat/completions", _chat),
    ("GET", "/v1/models", _models),
    ("GET", "/v1/models/{name:path}", _models),
    ("POST", "/tokenize", _tokenize),
    ("POST", "/detokenize", _detokenize),
    ("GET", "/health", _health),
    ("GET", "/metrics", _metrics),
    ("GET", "/metrics/targets", _targets),
)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    text = {404: f"there is no {request.url.path} here", 405: f"{request.method} is not for {request.url.path}"}
    response = ApiError(error.status_code, text.get(error.status_code, str(error.detail))).response()
    response.headers.update({**(error.headers or {}), "X-Request-Id": _request_id(request)})
    return response


async def read(request: Request) -> bytes:
    """The body. Raises ApiError where it, or all that are being read, are more than is taken."""
    service: Service = request.app.state.service
    raw, most = bytearray(), service.most_body_bytes
    try:
        async for part in request.stream():
            raw += part
            service.reading_bytes += len(part)
            if len(raw) > most:
                raise ApiError(
                    413, f"the body exceeds {most} bytes, which hold more text than fits the model's context", code="body_too_long"
                )
            if service.reading_bytes > MOST_READING_BYTES:
                raise ApiError(503, "too many long bodies are being read: try again", code="overloaded", retry_after_s=1)
    finally:
        service.reading_bytes -= len(raw)
    return bytes(raw)


def as_json(body: object, status: int = 200) -> Response:
    return Response(encode(body), status, media_type="application/json")


def _request_id(request: Request) -> str:
    """The client's, unless that is too long to be sent back with every chunk."""
    named = request.headers.get("x-request-id", "")
    return named if 0 < len(named) <= MOST_REQUEST_ID else uuid.uuid4().hex


def _check_request_id(request: Request) -> None:
    if (length := len(request.headers.get("x-request-id", ""))) > MOST_REQUEST_ID:
        raise ApiError(431, f"X-Request-Id has {length} characters, at most {MOST_REQUEST_ID} are taken", code="request_id_too_long")


def _check_is_json(request: Request) -> None:
    """No web page elsewhere may send this type unless the server lets it; any other type, and none, it may send to whom it likes."""
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "application/json":
        what = f"not {kind[:80]!r}" if kind else "and it is missing"
        raise ApiError(415, f"Content-Type must be application/json, {what}", code="unsupported_media_type")


def _check_client(service: Service, request: Request) -> None:
    """The cluster's token stands in for the key; an instance with a token and no key asks for the token."""
    key = service.api_key
    if (key is None and (service.token is None or service.open_to_clients)) or _has_token(service, request):
        return
    if key is None:
        raise _no_token()
    if not hmac.compare_digest(_bearer(request), key.encode()):
        raise ApiError(401, "the API key is missing or wrong: send Authorization: Bearer KEY", code="invalid_api_key")


def _check_peer(service: Service, request: Request) -> None:
    if not _of_the_cluster(service, request):
        raise _no_token()


def _of_the_cluster(service: Service, request: Request) -> bool:
    """May it name other instances, and order this one about? Where there is a token: who has it."""
    return service.token is None or _has_token(service, request)


def _has_token(service: Service, request: Request) -> bool:
    """In its own header; proxies that know none send it as they would an API key."""
    if service.token is None:
        return False
    token, named = service.token.encode(), request.headers.get(TOKEN_HEADER, "").encode()
    return hmac.compare_digest(named, token) or hmac.compare_digest(_bearer(request), token)


def _bearer(request: Request) -> bytes:
    scheme, _, word = request.headers.get("authorization", "").partition(" ")
    return word.encode() if scheme.lower() == "bearer" else b""


def _no_token() -> ApiError:
    how = f"send {TOKEN_HEADER}, or Authorization: Bearer TOKEN"
    return ApiError(401, f"the cluster's token is missing or wrong: {how}", code="invalid_token")


GUARDS: dict[str, Guard] = {"v1": _check_client, "tokenize": _check_client, "detokenize": _check_client, "pdlab": _check_peer}
