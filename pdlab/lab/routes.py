"""/api/v1: jobs of each kind, alike: submit, validate, list, look, listen, cancel, and what came of them."""

from __future__ import annotations

import io
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool

from pdlab.core.types import UsageError, nearest
from pdlab.experiment.mistakes import mistakes
from pdlab.lab.bodies import BoardBody, JobDetail, JobPage, JobView, MistakeView, SubmitBody, Submitted, Trouble, Validated
from pdlab.lab.job import CHOICES
from pdlab.lab.lab import PAGES, Lab, NotThere
from pdlab.lab.store import MOST_LISTED, JobFilter, JobKind, JobState
from pdlab.lab.submission import MOST_SEEDS, SubmissionReading
from pdlab.report.aggregates import AGGREGATES, MOST_STRETCHES, timeline
from pdlab.report.perfetto import write_trace
from pdlab.report.result import TRACE
from pdlab.results.run import REQUESTS, Run

PATHS = {
    JobKind.EXPERIMENT: "experiments",
    JobKind.PLAN: "plans",
    JobKind.SWEEP: "sweeps",
    JobKind.TUNING: "tunings",
    JobKind.BOARD: "boards",
}
YAML_TYPES = ("application/yaml", "application/x-yaml", "text/yaml", "text/x-yaml", "text/plain")
ARROW, PARQUET = "application/vnd.apache.arrow.stream", "application/vnd.apache.parquet"
# Its scripts are of no origin: they read nothing of the lab's, and reach nobody.
PAGE_CSP = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; "
    "frame-ancestors 'self'; sandbox allow-scripts allow-downloads"
)
TROUBLES: dict[int | str, dict[str, Any]] = {
    code: {"model": Trouble, "description": words}
    for code, words in ((401, "no token"), (404, "not there"), (422, "mistakes, as the command tells them"), (503, "no database"))
}
OF_YAML = [
    {"name": name, "in": "query", "required": False, "description": "Of an experiment that is sent as YAML.", "schema": schema}
    for name, schema in (
        ("seeds", {"type": "integer", "default": 1}),
        ("tag", {"type": "array", "items": {"type": "string"}}),
        ("set", {"type": "array", "items": {"type": "string"}}),
    )
]
_SUBMISSIONS: dict[int | str, dict[str, Any]] = {
    200: {"model": Submitted, "description": "it was there already"},
    400: {"model": Trouble, "description": "not a body that can be read"},
    413: {"model": Trouble, "description": "too long"},
    415: {"model": Trouble, "description": "neither JSON nor YAML"},
    429: {"model": Trouble, "description": "too many jobs wait"},
}


class Unreadable(Exception):
    """A body: the HTTP status, and a line."""

    def __init__(self, status: int, line: str) -> None:
        super().__init__(line)
        self.status = status


class Mistaken(Exception):
    """A submission that was read, and has mistakes."""

    def __init__(self, reading: SubmissionReading) -> None:
        super().__init__("\n".join(one.text for one in reading.mistakes))
        self.reading = reading


class RequestFormat(StrEnum):
    JSON = "json"
    ARROW = "arrow"
    PARQUET = "parquet"


def lab_of(request: Request) -> Lab:
    lab: Lab = request.app.state.lab
    return lab


def known_query(request: Request) -> None:
    """Raises UsageError for a parameter that the route has not."""
    route = request.scope["route"]
    known = [one.alias for one in route.dependant.query_params]
    known += [one["name"] for one in (route.openapi_extra or {}).get("parameters", ())]
    for name in request.query_params:
        if name not in known:
            there = nearest(name, known) or f"; there are {', '.join(known) or 'none'}"
            raise UsageError(f"{name[:80]}: unknown parameter{there}")


def api() -> APIRouter:
    router = APIRouter(prefix="/api/v1", responses=TROUBLES)
    for kind in JobKind:
        _add_kind(router, kind)
    _add_run(router)
    router.add_api_route("/jobs", _listing(None), methods=["GET"], response_model=JobPage, tags=["jobs"], summary="Jobs of all kinds")
    router.add_api_route("/jobs/{id}", _look(None), methods=["GET"], response_model=JobDetail, tags=["jobs"], summary="One, of any kind")
    router.add_api_route("/events", _all_events, methods=["GET"], tags=["jobs"], summary="Server-sent events of all jobs")
    router.add_api_route("/tags", _tags, methods=["GET"], tags=["jobs"], summary="All tags")
    return router


def _add_kind(router: APIRouter, kind: JobKind) -> None:
    path, tags = f"/{PATHS[kind]}", [PATHS[kind]]
    add = router.add_api_route
    extra: dict[str, Any] = {"requestBody": _request_body(kind)}
    if kind is JobKind.EXPERIMENT:
        extra["parameters"] = OF_YAML
    add(
        path,
        _submit(kind),
        methods=["POST"],
        status_code=201,
        response_model=Submitted,
        responses=_SUBMISSIONS,
        openapi_extra=extra,
        tags=list(tags),
        summary="Submit; what runs already, or has run, is not computed again",
    )
    add(path, _listing(kind), methods=["GET"], response_model=JobPage, tags=list(tags), summary="Those there are, in pages")
    if kind is not JobKind.BOARD:
        add(
            f"{path}/validate",
            _validate(kind),
            methods=["POST"],
            response_model=Validated,
            responses={key: value for key, value in _SUBMISSIONS.items() if key not in (200, 429)},
            openapi_extra=extra,
            tags=list(tags),
            summary="What is wrong with it, beside its lines",
        )
    add(f"{path}/{{id}}", _look(kind), methods=["GET"], response_model=JobDetail, tags=list(tags), summary="One: state, progress, summary")
    add(
        f"{path}/{{id}}",
        _cancel(kind),
        methods=["DELETE"],
        response_model=JobView,
        responses={409: {"model": Trouble, "description": "it has ended"}},
        tags=list(tags),
        summary="Cancel",
    )
    add(
        f"{path}/{{id}}/results",
        _forget(kind),
        methods=["DELETE"],
        response_model=JobView,
        responses={409: {"model": Trouble, "description": "it has not ended"}},
        tags=list(tags),
        summary="Delete one that has ended, with its files; what it was",
    )
    add(f"{path}/{{id}}/events", _events(kind), methods=["GET"], tags=list(tags), summary="Server-sent events until it ends")
    if kind in PAGES:
        add(f"{path}/{{id}}/report", _report(kind), methods=["GET"], tags=list(tags), summary="The page that the command writes")


def _add_run(router: APIRouter) -> None:
    """What only a run has, and a plan."""
    path, tags = "/experiments/{id}", ["experiments"]
    add = router.add_api_route
    add(f"{path}/requests", _requests, methods=["GET"], tags=list(tags), summary="Its requests, as JSON, Arrow or parquet")
    add(f"{path}/figures", _figures, methods=["GET"], tags=list(tags), summary="Distributions, load, and the worst requests")
    add(f"{path}/timeline", _timeline, methods=["GET"], tags=list(tags), summary="Requests through prefill, link and decode")
    add(f"{path}/trace", _trace, methods=["GET"], tags=list(tags), summary="A trace for ui.perfetto.dev")
    add("/plans/{id}/experiments", _choices, methods=["GET"], tags=["plans"], summary="The finalists' files, best first")


# ------------------------------------------------------------ taking in


def _request_body(kind: JobKind) -> dict[str, Any]:
    model = BoardBody if kind is JobKind.BOARD else SubmitBody
    content: dict[str, Any] = {"application/json": {"schema": model.model_json_schema()}}
    if kind is JobKind.EXPERIMENT:
        content["application/yaml"] = {"schema": {"type": "string"}}
    return {"required": True, "content": content}


async def _body(request: Request, kind: JobKind) -> SubmitBody:
    """JSON, or of an experiment its file as YAML, with `seeds` and `tag` in the query. Raises Unreadable, UsageError."""
    said = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    raw = await request.body()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise Unreadable(400, "the body is not UTF-8") from None
    if said in YAML_TYPES and kind is JobKind.EXPERIMENT:
        query = request.query_params
        seeds = query.get("seeds", "1")
        if not (seeds.isascii() and seeds.isdecimal() and len(seeds) < 9):
            raise UsageError(f"seeds {seeds[:40]!r}: write 1 to {MOST_SEEDS:,}")
        return SubmitBody(experiment=text, seeds=int(seeds), tags=query.getlist("tag"), set=query.getlist("set"))
    if said != "application/json":
        raise Unreadable(415, f"content type {said[:80] or 'missing'!r}: send application/json, or an experiment as application/yaml")
    for name in request.query_params:
        raise UsageError(f"{name}: goes into the body where that is JSON")
    return _from_json(text, kind)


def _from_json(text: str, kind: JobKind) -> SubmitBody:
    try:
        mapping = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unreadable(400, f"the body is no JSON: {error}") from None
    model = BoardBody if kind is JobKind.BOARD else SubmitBody
    try:
        read = model.model_validate(mapping)
    except ValidationError as error:
        raise UsageError("\n".join(mistakes(error, model))) from None
    if isinstance(read, BoardBody):
        return SubmitBody(experiment={}, tags=read.tags, options={"rows": read.rows, "models": read.models})
    assert isinstance(read, SubmitBody), "there are two"
    return read


async def _read(request: Request, kind: JobKind) -> tuple[SubmitBody, SubmissionReading]:
    body = await _body(request, kind)
    reading = await run_in_threadpool(lab_of(request).read, kind, body.experiment, body.seeds, body.set, body.options)
    return body, reading


def _submit(kind: JobKind) -> Callable[..., Any]:
    async def submit(request: Request, response: Response) -> Submitted:
        lab = lab_of(request)
        body, reading = await _read(request, kind)
        if reading.order is None:
            raise Mistaken(reading)
        row, new = await run_in_threadpool(lab.submit, reading, body.tags)
        response.status_code = 201 if new else 200
        response.headers["location"] = f"/api/v1/{PATHS[kind]}/{row.order.id}"
        return Submitted(**lab.view(row).model_dump(), new=new, doubts=list(reading.doubts))

    return submit


def _validate(kind: JobKind) -> Callable[..., Any]:
    async def validate(request: Request) -> Validated:
        _, reading = await _read(request, kind)
        found = [MistakeView(text=one.text, path=one.path, line=one.line) for one in reading.mistakes]
        id = "" if reading.order is None else reading.order.id
        return Validated(id=id, mistakes=found, doubts=list(reading.doubts), resolved=reading.resolved)

    return validate


# ------------------------------------------------------------ giving out


def _listing(kind: JobKind | None) -> Callable[..., Any]:
    def listing(
        request: Request,
        state: JobState | None = None,
        tag: Annotated[str | None, Query(max_length=64)] = None,
        policy: Annotated[str | None, Query(max_length=2000)] = None,
        model: Annotated[str | None, Query(max_length=2000)] = None,
        text: Annotated[str | None, Query(max_length=200, description="Part of a name, policy, model or id.")] = None,
        sort: str = "submitted_s",
        descending: bool = True,
        offset: Annotated[int, Query(ge=0, le=1 << 40)] = 0,
        limit: Annotated[int, Query(ge=1, le=MOST_LISTED)] = 100,
    ) -> JobPage:
        lab = lab_of(request)
        wanted = JobFilter(kind, state, *(_storable(one) for one in (tag, policy, model, text)))
        rows, total = lab.store.listed(wanted, sort=sort, descending=descending, offset=offset, limit=limit)
        return JobPage(total=total, offset=offset, jobs=[lab.view(row) for row in rows])

    return listing


def _storable(text: str | None) -> str | None:
    """PostgreSQL has no text with a NUL in it. Raises UsageError."""
    if text is not None and "\0" in text:
        raise UsageError(f"{text[:40]!r} has a NUL character, which no name has")
    return text


def _look(kind: JobKind | None) -> Callable[..., Any]:
    def look(request: Request, id: str) -> JobDetail:
        lab = lab_of(request)
        return lab.detail(lab.row(kind, id))

    return look


def _cancel(kind: JobKind) -> Callable[..., Any]:
    def cancel(request: Request, id: str) -> Any:
        lab = lab_of(request)
        row = lab.row(kind, id)
        if not lab.foreman.cancel(id):
            line = f"{kind} {id} is {row.state}: there is nothing to cancel"
            return JSONResponse(Trouble(errors=[line]).model_dump(), 409)
        return lab.view(lab.row(kind, id))

    return cancel


def _forget(kind: JobKind) -> Callable[..., Any]:
    def forget(request: Request, id: str) -> Any:
        lab = lab_of(request)
        row = lab.row(kind, id)
        if not lab.forget(row):
            line = f"{kind} {id} is {row.state}: cancel it, and then delete it"
            return JSONResponse(Trouble(errors=[line]).model_dump(), 409)
        return lab.view(row)

    return forget


def _events(kind: JobKind) -> Callable[..., Any]:
    async def events(request: Request, id: str) -> StreamingResponse:
        lab = lab_of(request)
        row = await run_in_threadpool(lab.row, kind, id)
        return StreamingResponse(_job_events(lab, row.order.id), media_type="text/event-stream", headers={"cache-control": "no-store"})

    return events


async def _job_events(lab: Lab, id: str) -> AsyncIterator[str]:
    """The whole state first, then again whenever there is news, until it has ended: who comes back misses nothing."""
    with lab.feed.listening(id) as listener:
        listener.changed[id] = None
        listener.woken.set()
        async for changed in lab.feed.changes(listener):
            if not changed:
                yield ": still here\n\n"
                continue
            try:
                view = await lab.news(id)
            except NotThere:  # it was deleted
                return
            yield f"event: job\ndata: {view.model_dump_json()}\n\n"
            if view.state.ended:
                yield "event: end\ndata: {}\n\n"
                return


async def _all_events(request: Request) -> StreamingResponse:
    lab = lab_of(request)

    async def told() -> AsyncIterator[str]:
        with lab.feed.listening(None) as listener:
            yield ": here\n\n"
            async for changed in lab.feed.changes(listener):
                if not changed:
                    yield ": still here\n\n"
                for id in changed:
                    with suppress(NotThere):  # it was deleted
                        view = await lab.news(id)
                        yield f"event: job\ndata: {view.model_dump_json()}\n\n"

    return StreamingResponse(told(), media_type="text/event-stream", headers={"cache-control": "no-store"})


def _tags(request: Request) -> list[str]:
    return lab_of(request).store.tags()


def _report(kind: JobKind) -> Callable[..., Any]:
    def report(request: Request, id: str) -> Response:
        _, folder = lab_of(request).done(kind, id)
        return _file(folder / PAGES[kind], "text/html; charset=utf-8", headers={"content-security-policy": PAGE_CSP})

    return report


def _requests(
    request: Request,
    id: str,
    format: Annotated[RequestFormat | None, Query(description="In place of the Accept header.")] = None,
    offset: Annotated[int, Query(ge=0, le=1 << 40)] = 0,
    limit: Annotated[int, Query(ge=1, le=100_000, description="Rows of JSON.")] = 1000,
) -> Response:
    _, folder = lab_of(request).done(JobKind.EXPERIMENT, id)
    path, accept = folder / REQUESTS, request.headers.get("accept", "")
    if format is RequestFormat.PARQUET or (format is None and PARQUET in accept):
        return _file(path, PARQUET, filename=f"{id}.parquet")
    if not path.is_file():
        raise NotThere(f"experiment {id}: its requests are gone ({path.name})")
    if format is None and not _takes_one(accept):
        raise Unreadable(406, f"accept {accept[:80]!r}: requests come as application/json, {ARROW} or {PARQUET}; format= says which, too")
    if format is RequestFormat.ARROW or (format is None and "arrow" in accept):
        return StreamingResponse(_arrow(path), media_type=ARROW)
    return JSONResponse(_rows(path, offset, limit))


def _takes_one(accept: str) -> bool:
    names = [part.partition(";")[0].strip().lower() for part in accept.split(",") if part.strip()]
    return not names or any(name in ("*/*", "application/*", "application/json") or "arrow" in name for name in names)


class _Chunks(io.RawIOBase):
    """What is written, taken away piece by piece."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, part: Any) -> int:
        self.parts.append(bytes(part))
        return len(part)

    def taken(self) -> bytes:
        found, self.parts = b"".join(self.parts), []
        return found


def _arrow(path: Path) -> Iterator[bytes]:
    """In batches: a million requests are never here at once."""
    chunks = _Chunks()
    with pq.ParquetFile(path) as file:
        schema = file.schema_arrow.remove_metadata()
        with pa.ipc.new_stream(chunks, schema) as writer:
            for batch in file.iter_batches(1 << 16):
                writer.write_batch(pa.RecordBatch.from_arrays(batch.columns, schema=schema))
                yield chunks.taken()
    yield chunks.taken()


def _rows(path: Path, offset: int, limit: int) -> dict[str, Any]:
    table = pq.read_table(path)
    frame = table.slice(min(offset, table.num_rows), limit).to_pandas()
    rows = json.loads(frame.to_json(orient="records", double_precision=9))
    return {"total": table.num_rows, "offset": offset, "requests": rows}


def _figures(request: Request, id: str) -> Response:
    _, folder = lab_of(request).done(JobKind.EXPERIMENT, id)
    return _file(folder / AGGREGATES, "application/json")


def _timeline(
    request: Request,
    id: str,
    from_s: Annotated[float, Query(allow_inf_nan=False)] = 0.0,
    to_s: Annotated[float | None, Query(allow_inf_nan=False)] = None,
    limit: Annotated[int, Query(ge=1, le=MOST_STRETCHES)] = 80,
) -> dict[str, Any]:
    _, folder = lab_of(request).done(JobKind.EXPERIMENT, id)
    return timeline(folder, from_s, to_s, limit)


def _trace(request: Request, id: str) -> Response:
    """Made when it is first asked for."""
    row, folder = lab_of(request).done(JobKind.EXPERIMENT, id)
    path = folder / TRACE
    if not path.is_file():
        run, aside = Run.load(folder), path.with_name(f".{path.name}")
        write_trace(aside, run.records, spans=(), samples=run.samples)
        aside.replace(path)
    return _file(path, "application/gzip", filename=f"{row.order.id}.trace.json.gz")


def _choices(request: Request, id: str) -> Response:
    _, folder = lab_of(request).done(JobKind.PLAN, id)
    return _file(folder / CHOICES, "application/json")


def _file(path: Path, media_type: str, **more: Any) -> FileResponse:
    if not path.is_file():
        raise NotThere(f"{path.parent.name}: its {path.name} is gone")
    return FileResponse(path, media_type=media_type, **more)
