"""The lab as an ASGI application: the API, its documentation, and the pages that read it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import swagger_ui_bundle
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from pdlab import __version__
from pdlab.core.types import UsageError
from pdlab.experiment.mistakes import explained
from pdlab.lab.bodies import MistakeView, Trouble
from pdlab.lab.catalogue import catalogue
from pdlab.lab.compare import comparing
from pdlab.lab.database import DatabaseAway
from pdlab.lab.guard import CSP, Guard, TurnedAway
from pdlab.lab.lab import ClusterAway, Lab, NotThere, TooMany
from pdlab.lab.pages import pages, static_files
from pdlab.lab.routes import Mistaken, Unreadable, api, known_query
from pdlab.lab.uploads import uploading

SWAGGER = Path(swagger_ui_bundle.__file__).parent
ABOUT = "Experiments, plans, sweeps, tunings and boards: submitted, watched, compared. docs/guides/lab.md explains it."


def create_app(lab: Lab) -> ASGIApp:
    """Of a lab whose foreman is started with the application, and stopped with it."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        lab.feed.open()
        lab.foreman.start()
        try:
            yield
        finally:
            lab.feed.close()
            lab.close()

    app = FastAPI(title="pdlab lab", version=__version__, description=ABOUT, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.lab = lab
    for router in (api(), catalogue(), comparing(), uploading(), _of_clusters(lab)):
        app.include_router(router, dependencies=[Depends(known_query)])
    app.include_router(pages())
    app.add_api_route("/healthz", _health, methods=["GET"], tags=["lab"], summary="Is it there, and what does it do?")
    app.add_api_route("/docs", _docs, methods=["GET"], include_in_schema=False)
    app.mount("/static/swagger", StaticFiles(directory=_swagger_files()))
    app.mount("/static", static_files())
    for error, handler in _HANDLERS:
        app.add_exception_handler(error, handler)
    return Guard(app, lab.settings)


def _of_clusters(lab: Lab) -> APIRouter:
    """What asks routers is loaded where there are any."""
    if lab.settings.routers or lab.settings.registries:
        made: APIRouter = import_module("pdlab.lab.clusters").clusters()
        return made
    router = APIRouter(prefix="/api/v1", tags=["clusters"])
    router.add_api_route(
        "/clusters", _none, methods=["GET"], response_model=list[dict[str, str]], summary="None: there is neither --router nor --registry"
    )
    return router


def _none() -> list[dict[str, str]]:
    return []


def _swagger_files() -> Path:
    return next(path.parent for path in sorted(SWAGGER.rglob("swagger-ui-bundle.js")))


def _health(request: Request) -> dict[str, Any]:
    """Who has no token learns no more than that it is there."""
    lab: Lab = request.app.state.lab
    counts = lab.store.counts()
    return {"status": "ok"} if lab.settings.token else {"status": "ok", "version": __version__, "jobs": counts}


def _docs() -> HTMLResponse:
    page = get_swagger_ui_html(
        openapi_url="/openapi.json",
        title="pdlab lab: API",
        swagger_js_url="/static/swagger/swagger-ui-bundle.js",
        swagger_css_url="/static/swagger/swagger-ui.css",
        swagger_favicon_url="/static/swagger/favicon-32x32.png",
    )
    page.headers["content-security-policy"] = CSP.decode().replace("script-src 'self'", "script-src 'self' 'unsafe-inline'")
    return page


def _told(status: int, lines: list[str], found: list[MistakeView] | None = None) -> JSONResponse:
    return JSONResponse(Trouble(errors=lines, mistakes=found or []).model_dump(), status)


async def _usage(_: Request, error: Exception) -> JSONResponse:
    return _told(422, str(error).splitlines())


async def _mistaken(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Mistaken), "it is registered for that"
    found = [MistakeView(text=one.text, path=one.path, line=one.line) for one in error.reading.mistakes]
    return _told(422, [one.text for one in found], found)


async def _unreadable(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Unreadable), "it is registered for that"
    return _told(error.status, [str(error)])


async def _refused(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, TurnedAway), "it is registered for that"
    return _told(error.status, [error.line])


async def _away(_: Request, error: Exception) -> JSONResponse:
    answer = _told(503, [f"{error}; what was submitted is kept, try again"])
    answer.headers["retry-after"] = "5"
    return answer


async def _not_there(_: Request, error: Exception) -> JSONResponse:
    return _told(404, [str(error)])


async def _cluster_away(_: Request, error: Exception) -> JSONResponse:
    return _told(502, [str(error)])


async def _too_many(_: Request, error: Exception) -> JSONResponse:
    answer = _told(429, [str(error)])
    answer.headers["retry-after"] = "10"
    return answer


async def _http(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException), "it is registered for that"
    answer = _told(error.status_code, [str(error.detail)])
    answer.headers.update(error.headers or {})
    return answer


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError), "it is registered for that"
    known = [name for one in request.scope["route"].dependant.body_params for name in one.field_info.annotation.model_fields]
    return _told(422, [line for one in error.errors() for line in _lines(one, known)])


def _lines(detail: Any, known: list[str]) -> list[str]:
    if detail["type"] == "json_invalid":
        return [f"the body is no JSON: {detail['ctx']['error']}"]
    if detail["loc"] == ("body",):
        return ["the body is no JSON object; send one, as application/json"]
    place = ".".join(str(part) for part in detail["loc"][1:])
    return [f"{place}: {words}" for words in explained(detail, known if len(detail["loc"]) == 2 else ())]


_HANDLERS = (
    (UsageError, _usage),
    (Mistaken, _mistaken),
    (Unreadable, _unreadable),
    (TurnedAway, _refused),
    (DatabaseAway, _away),
    (ClusterAway, _cluster_away),
    (NotThere, _not_there),
    (TooMany, _too_many),
    (HTTPException, _http),
    (RequestValidationError, _invalid),
)
