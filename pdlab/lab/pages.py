"""The lab's pages: shells that read the API in the browser, and the way in where a token is asked for. Nothing comes from elsewhere."""

from __future__ import annotations

import hmac
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from urllib.parse import parse_qs

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse, Response
from starlette.staticfiles import StaticFiles

from pdlab import __version__
from pdlab.lab.guard import COOKIE, LOGIN, session
from pdlab.lab.routes import lab_of
from pdlab.report.page import escaped
from pdlab.report.script import plotly_js

STATIC = Path(__file__).parent / "static"
PLOTLY = f"/static/plotly-{version('plotly')}.js"
KEPT = {"cache-control": "max-age=31536000, immutable"}  # its URL has its version
MONTH_S = 30 * 24 * 3600
_NAV = (("/", "Runs"), ("/new", "New"), ("/uploads", "Uploads"), ("/clusters", "Clusters"), ("/docs", "API"))
_KINDS = ("plans", "sweeps", "tunings", "boards")


def pages() -> APIRouter:
    router = APIRouter(include_in_schema=False)
    get = ["GET"]
    router.add_api_route("/", lambda: _shell("runs", "Runs", at="/"), methods=get)
    router.add_api_route("/new", lambda: _shell("new", "New", at="/new"), methods=get)
    router.add_api_route("/compare", lambda: _shell("compare", "Compare", charts=True), methods=get)
    router.add_api_route("/uploads", lambda: _shell("uploads", "Uploads", at="/uploads"), methods=get)
    router.add_api_route("/clusters", lambda: _shell("clusters", "Clusters", at="/clusters"), methods=get)
    router.add_api_route("/clusters/{id}", _cluster, methods=get)
    router.add_api_route("/runs/{id}", _run, methods=get)
    for kind in _KINDS:
        router.add_api_route(f"/{kind}/{{id}}", _job(kind), methods=get)
    router.add_api_route(LOGIN, _login, methods=get)
    router.add_api_route(LOGIN, _enter, methods=["POST"])
    router.add_api_route(PLOTLY, _plotly, methods=get)
    return router


def static_files() -> StaticFiles:
    return StaticFiles(directory=STATIC, packages=[("pdlab.report", "static")])


def _run(id: str) -> HTMLResponse:
    return _shell("run", "Run", charts=True, id=id)


def _cluster(id: str) -> HTMLResponse:
    return _shell("cluster", id, charts=True, id=id)


def _job(kind: str) -> Callable[[str], HTMLResponse]:
    def job(id: str) -> HTMLResponse:
        return _shell("job", kind.removesuffix("s").capitalize(), charts=True, id=id, kind=kind)

    return job


def _shell(script: str, title: str, *, at: str = "", charts: bool = False, **told: str) -> HTMLResponse:
    """`told` is for the script."""
    links = "".join(f'<a href="{path}"{" aria-current=page" if path == at else ""}>{words}</a>' for path, words in _NAV)
    values = "".join(f' data-{name}="{escaped(value)}"' for name, value in told.items())
    drawing = f'<script defer src="{PLOTLY}"></script>' if charts else ""
    parts = ("lab", "parts", *(("charts", "run_figures") if charts else ()))
    early = "".join(f'<link rel=modulepreload href="/static/{name}.js">' for name in parts)
    body = f"""<a class=skip href="#main">To the content</a>
<header><b>pdlab lab</b><nav aria-label="Pages">{links}</nav>
<span class=end><span id=line class=lost role=status></span><button id=theme type=button>Light or dark</button></span></header>
<main id=main{values}><div id=told></div></main>
{drawing}{early}<script type=module src="/static/{script}.js?{__version__}"></script>"""
    return HTMLResponse(_document(title, body))


def _document(title: str, body: str) -> str:
    head = (
        f'<meta charset=utf-8><meta name=viewport content="width=device-width,initial-scale=1"><title>{escaped(title)} · pdlab lab</title>'
        f'<link rel=stylesheet href="/static/lab.css?{__version__}"><link rel=icon href="data:,">'
    )
    return f"<!doctype html>\n<html lang=en><head>{head}</head>\n<body>\n{body}\n</body></html>\n"


def _plotly() -> FileResponse:
    return FileResponse(plotly_js(), media_type="text/javascript", headers=KEPT)


def _login(wrong: str = "") -> HTMLResponse:
    told = f'<p class="note error" role=alert>{escaped(wrong)}</p>' if wrong else ""
    body = f"""<main id=main><h1>pdlab lab</h1>{told}
<form method=post action="{LOGIN}" class=bar>
<label>The lab's token<input type=password name=token autocomplete=current-password required autofocus></label>
<button class=main>Log in</button></form></main>"""
    return HTMLResponse(_document("Log in", body), 401 if wrong else 200)


async def _enter(request: Request) -> Response:
    """The token becomes a cookie that no script reads, and no other site sends."""
    token = lab_of(request).settings.token
    given = parse_qs((await request.body()).decode("utf-8", errors="replace")).get("token", [""])[0]
    if token and not hmac.compare_digest(session(given), session(token)):
        return _login("That is not this lab's token.")
    answer = RedirectResponse("/", 303)
    if token:
        answer.set_cookie(COOKIE, session(token), max_age=MONTH_S, httponly=True, samesite="strict", secure=request.url.scheme == "https")
    return answer
