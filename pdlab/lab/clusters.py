"""Clusters that run: what their routers tell of instances, requests and events, and an operator's drain and switch, with its token.

The lab asks a router as `pdlab status` does, and an instance as `pdlab drain` does; it keeps nothing of what they say. `shadows` has what
another policy would decide.
"""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import pandas as pd
from fastapi import APIRouter, FastAPI, Query, Request
from pydantic import BaseModel, ConfigDict

from pdlab.core.types import Role, UsageError, nearest
from pdlab.lab.bodies import Trouble
from pdlab.lab.lab import ClusterAway, NotThere
from pdlab.lab.registries import ClusterRegistries
from pdlab.lab.routes import lab_of
from pdlab.lab.settings import LabSettings
from pdlab.lab.shadows import ClusterShadows, ShadowOrder, WhatIfBody, WhatIfView
from pdlab.real.net.credentials import kept_token, without_password
from pdlab.real.net.http import Broken, HttpClient
from pdlab.real.router import status
from pdlab.report.stages import stretches
from pdlab.results.records import FIELDS, Records

LAST = 200  # requests of a timeline


class ClusterView(BaseModel):
    """`url` is its router's, or its registry's."""

    name: str
    url: str


class SwitchBody(BaseModel):
    """`force`: even where nobody else has its role."""

    model_config = ConfigDict(extra="forbid")

    role: str
    force: bool = False


class DrainBody(BaseModel):
    """`force`: even where nobody else has its role."""

    model_config = ConfigDict(extra="forbid")

    force: bool = False


class ClusterAnswer(BaseModel):
    """What happens now, in words."""

    words: str


@dataclass(frozen=True, slots=True)
class RouterAsker:
    """Of one router."""

    url: str
    token: str

    async def get(self, path: str) -> dict[str, Any]:
        """Raises ClusterAway."""
        code, raw = await self._call(path)
        found = _json(raw)
        if code != 200 or not isinstance(found, dict):
            raise self._no_router(path, code)
        return found

    async def trace(self, offset: int) -> bytes:
        """Of its event log, from that byte on. Raises ClusterAway, and UsageError where it keeps none."""
        path = f"/pdlab/v1/trace?offset={offset}"
        code, raw = await self._call(path)
        if code == 409:
            found = _json(raw)
            raise UsageError(f"{self.url}: {found['error']['message']}" if isinstance(found, dict) else f"{self.url} keeps no event log")
        if code != 200:
            raise self._no_router(path, code)
        return raw

    def _no_router(self, path: str, code: int) -> ClusterAway:
        return ClusterAway(f"{self.url}{path} answers {code}: it is no router of this pdlab's")

    async def _call(self, path: str) -> tuple[int, bytes]:
        http = HttpClient(self.url, self.token)
        try:
            code, raw = await http.call(b"GET", path.encode())
        except Broken as broken:
            raise ClusterAway(f"{self.url} does not answer: {broken}") from None
        finally:
            http.close()
        if code == 401:
            raise ClusterAway(f"{self.url} wants the cluster's token: start the lab with PDLAB_INTERNAL_TOKEN")
        return code, raw


def _json(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except ValueError:
        return None


def clusters() -> APIRouter:
    away: dict[int | str, dict[str, Any]] = {
        404: {"model": Trouble, "description": "no cluster of that name"},
        422: {"model": Trouble, "description": "mistakes, as the command tells them"},
        502: {"model": Trouble, "description": "its router does not answer"},
    }
    router = APIRouter(prefix="/api/v1/clusters", tags=["clusters"], responses=away, lifespan=_asking)
    add = router.add_api_route
    add("", _clusters, methods=["GET"], response_model=list[ClusterView], summary="Those that the lab was started with")
    add("/{name}/instances", _instances, methods=["GET"], summary="Roles, load, KV and links, and which router leads")
    add("/{name}/requests", _requests, methods=["GET"], summary="Under way, and the last that ended")
    add("/{name}/timeline", _timeline, methods=["GET"], summary="Requests through prefill, link and decode")
    add("/{name}/events", _events, methods=["GET"], summary="Members, roles, migrations, alarms")
    what_if = "/{name}/what-if"
    said = WhatIfView | None
    add(what_if, _ask_what_if, methods=["POST"], status_code=201, response_model=WhatIfView, summary="Ask another policy beside, live")
    add(what_if, _what_if, methods=["GET"], response_model=said, summary="Where it would decide otherwise; null where none is asked")
    add(what_if, _stop_what_if, methods=["DELETE"], response_model=said, summary="Ask it no more; what it said last, or null")
    one = "/{name}/instances/{instance}"
    add(f"{one}/drain", _drain, methods=["POST"], response_model=ClusterAnswer, summary="Let it finish what it has, and leave")
    add(f"{one}/switch", _switch, methods=["POST"], response_model=ClusterAnswer, summary="Let it finish what it has, and change its role")
    return router


def _known(settings: LabSettings, name: str) -> None:
    """Raises NotThere."""
    names = [*settings.routers, *settings.registries]
    if name not in names:
        raise NotThere(f"no cluster is named {name[:80]!r}; there are {', '.join(names)}")


async def _asker(request: Request, name: str) -> RouterAsker:
    """Raises NotThere, ClusterAway."""
    settings = lab_of(request).settings
    _known(settings, name)
    url = settings.routers.get(name) or await _registries(request).router_url(name)
    return RouterAsker(url, settings.router_token or kept_token(url))


@asynccontextmanager
async def _views(request: Request, name: str) -> AsyncIterator[tuple[status.Source, str]]:
    """Of its instances, and the cluster's token. Raises NotThere, ClusterAway."""
    settings = lab_of(request).settings
    _known(settings, name)
    if name in settings.registries:
        yield lambda: _registries(request).view(name), settings.router_token
        return
    asker = await _asker(request, name)
    async with status.source(None, asker.url, asker.token) as views:
        yield views, asker.token


def _registries(request: Request) -> ClusterRegistries:
    found: ClusterRegistries = request.app.state.registries
    return found


def _clusters(request: Request) -> list[ClusterView]:
    settings = lab_of(request).settings
    registries = {name: without_password(url) for name, url in settings.registries.items()}
    return [ClusterView(name=name, url=url) for name, url in {**settings.routers, **registries}.items()]


async def _instances(request: Request, name: str) -> dict[str, Any]:
    try:
        async with _views(request, name) as (views, _):
            return status.plain(await views())
    except UsageError as error:
        raise ClusterAway(str(error)) from None


async def _requests(request: Request, name: str, limit: Annotated[int, Query(ge=1, le=1000)] = 200) -> dict[str, Any]:
    return await (await _asker(request, name)).get(f"/pdlab/v1/requests?limit={limit}")


async def _events(request: Request, name: str, after: Annotated[int, Query(ge=0, le=1 << 53)] = 0) -> dict[str, Any]:
    return await (await _asker(request, name)).get(f"/pdlab/v1/events?after={after}")


async def _timeline(request: Request, name: str, limit: Annotated[int, Query(ge=1, le=1000)] = LAST) -> dict[str, Any]:
    told = await (await _asker(request, name)).get(f"/pdlab/v1/requests?limit={limit}")
    return stages(told)


def stages(told: Mapping[str, Any]) -> dict[str, Any]:
    """Of what a router says of its requests: each stage's beginnings and ends, of one that goes on up to now."""
    now_s, rows = float(told["now_s"]), told["requests"]
    frame = pd.DataFrame(rows, columns=list(FIELDS))
    for name in FIELDS:
        if name in ("status", "prefill_instance", "decode_instance", "reason"):
            frame[name] = frame[name].astype("category")
        else:
            frame[name] = pd.to_numeric(frame[name], errors="coerce").astype("float64")
    found = stretches(Records.from_frame(frame)) if rows else []
    made = []
    for one in found:
        pairs = [_ended(start, end, now_s) for start, end in zip(one.start_s, one.end_s, strict=True)]
        made.append({"name": one.name, "place": one.place, "start_s": [a for a, _ in pairs], "end_s": [b for _, b in pairs]})
    texts = {name: [row.get(name) for row in rows] for name in ("status", "prefill_instance", "decode_instance")}
    return {"now_s": now_s, "request_id": [row["request_id"] for row in rows], "stages": made, **texts}


def _ended(start: float, end: float, now_s: float) -> tuple[float | None, float | None]:
    if not math.isfinite(start):
        return None, None
    return float(start), float(end) if math.isfinite(end) else now_s


async def _drain(request: Request, name: str, instance: str, body: DrainBody) -> ClusterAnswer:
    async with _views(request, name) as (views, token):
        return ClusterAnswer(words=await status.drain(views, instance, token, force=body.force, wait=False))


async def _switch(request: Request, name: str, instance: str, body: SwitchBody) -> ClusterAnswer:
    if body.role not in list(Role):
        raise UsageError(f"role {body.role[:40]!r} is not one of {', '.join(Role)}{nearest(body.role, list(Role))}")
    async with _views(request, name) as (views, token):
        return ClusterAnswer(words=await status.switch(views, instance, Role(body.role), token, force=body.force, wait=False))


# ------------------------------------------------------------ another policy beside


@asynccontextmanager
async def _asking(app: FastAPI) -> AsyncIterator[None]:
    app.state.shadows = ClusterShadows(app.state.lab.context)
    app.state.registries = ClusterRegistries(app.state.lab.settings.registries)
    try:
        yield
    finally:
        await app.state.shadows.close()
        await app.state.registries.close()


def _shadows(request: Request) -> ClusterShadows:
    shadows: ClusterShadows = request.app.state.shadows
    return shadows


async def _ask_what_if(request: Request, name: str, body: WhatIfBody) -> WhatIfView:
    lab = lab_of(request)
    asker = await _asker(request, name)
    return await _shadows(request).ask(name, asker.trace, ShadowOrder(body.policy, lab.foreman.uploads, lab.settings.allow_code))


async def _what_if(request: Request, name: str) -> WhatIfView | None:
    _known(lab_of(request).settings, name)
    return _shadows(request).of(name)


async def _stop_what_if(request: Request, name: str) -> WhatIfView | None:
    _known(lab_of(request).settings, name)
    return await _shadows(request).stop(name)
