"""Files that experiments may name: traces, configs of models, profiles, tables of measured servers; and policies where code is allowed.

A name is given once: what has run keeps meaning what it meant.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import time
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool

from pdlab.core.types import UsageError
from pdlab.lab.bodies import Trouble, UploadView
from pdlab.lab.guard import TurnedAway
from pdlab.lab.lab import Lab, NotThere
from pdlab.lab.routes import lab_of
from pdlab.lab.settings import GIB
from pdlab.lab.store import Upload

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_PACKED = (".gz", ".zst")


class UploadKind(StrEnum):
    TRACE = "trace"
    CONFIG = "config"
    PROFILE = "profile"
    ROWS = "rows"
    POLICY = "policy"


ENDINGS = {
    UploadKind.TRACE: (".csv", ".json", ".jsonl", ".tsv", ".txt", ".log", ".parquet"),
    UploadKind.CONFIG: (".json",),
    UploadKind.PROFILE: (".json",),
    UploadKind.ROWS: (".csv",),
    UploadKind.POLICY: (".py",),
}


def uploading() -> APIRouter:
    router = APIRouter(prefix="/api/v1", tags=["uploads"])
    taken: dict[int | str, dict[str, Any]] = {
        200: {"model": UploadView, "description": "the same file was there already"},
        403: {"model": Trouble, "description": "a policy, where code is not allowed"},
        404: {"model": Trouble, "description": "no file has that name"},
        409: {"model": Trouble, "description": "another file has that name"},
        413: {"model": Trouble, "description": "too long, or more than all may take together"},
        422: {"model": Trouble, "description": "mistakes"},
    }
    body = {"requestBody": {"required": True, "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}}
    router.add_api_route(
        "/uploads",
        _upload,
        methods=["POST"],
        status_code=201,
        response_model=UploadView,
        responses=taken,
        openapi_extra=body,
        summary="A file, as the body; experiments name it by its name",
    )
    router.add_api_route("/uploads", _uploads, methods=["GET"], response_model=list[UploadView], summary="The files there are")
    gone: dict[int | str, dict[str, Any]] = {404: taken[404], 409: {"model": Trouble, "description": "a job will read it"}}
    router.add_api_route(
        "/uploads/{name}", _delete, methods=["DELETE"], response_model=UploadView, responses=gone, summary="Delete it; what it was"
    )
    return router


def check(name: str, kind: UploadKind) -> None:
    """Raises UsageError."""
    if not NAME.fullmatch(name):
        folders = "a name has no folders; " if "/" in name or "\\" in name else ""
        raise UsageError(f"name {name[:80]!r}: {folders}take letters, digits, . _ and -, a letter or a digit first, up to 100")
    ends = name.lower()
    for packed in _PACKED if kind is UploadKind.TRACE else ():
        ends = ends.removesuffix(packed)
    if not ends.endswith(ENDINGS[kind]):
        raise UsageError(f"name {name!r}: a {kind} ends with {', '.join(ENDINGS[kind])}")


async def _upload(request: Request, response: Response, name: Annotated[str, Query(max_length=200)], kind: UploadKind) -> Any:
    lab = lab_of(request)
    check(name, kind)
    if kind is UploadKind.POLICY and not lab.settings.allow_code:
        line = "a policy is code, which this lab does not take: whoever starts it has to say --allow-code"
        return JSONResponse(Trouble(errors=[line]).model_dump(), 403)
    room = await run_in_threadpool(_room, lab)
    aside = Path(tempfile.mkstemp(prefix=".upload-", dir=lab.foreman.uploads)[1])
    try:
        digest, size = hashlib.sha256(), 0
        with aside.open("wb") as file:
            async for part in request.stream():
                digest.update(part)
                size += len(part)
                if size > room:
                    raise _full(lab)
                await run_in_threadpool(file.write, part)
        found, new = await run_in_threadpool(keep, lab, aside, Upload(name, kind.value, size, digest.hexdigest(), time.time()))
    except OSError as error:
        raise UsageError(f"{name}: cannot be kept ({error.strerror or type(error).__name__})") from None
    finally:
        aside.unlink(missing_ok=True)
    if found.sha256 != digest.hexdigest():
        line = f"{name}: another file has that name, of {found.bytes:,} bytes; give this one another"
        return JSONResponse(Trouble(errors=[line]).model_dump(), 409)
    response.status_code = 201 if new else 200
    return UploadView(**asdict(found))


def keep(lab: Lab, aside: Path, upload: Upload) -> tuple[Upload, bool]:
    """And whether it is new. The database says whose a name is; the file is there before anybody can name it."""
    with lab.keeping:
        there = next((one for one in lab.store.uploads() if one.name == upload.name), None)
        if there is not None:
            return there, False
        if upload.bytes > _room(lab):  # another came meanwhile
            raise _full(lab)
        os.chmod(aside, 0o644)
        os.replace(aside, lab.foreman.uploads / upload.name)
        return lab.store.add_upload(upload), True


def _room(lab: Lab) -> float:
    return lab.settings.most_uploads_bytes - sum(one.bytes for one in lab.store.uploads())


def _full(lab: Lab) -> TurnedAway:
    most = f"{lab.settings.most_uploads_bytes / GIB:g} GiB"
    return TurnedAway(413, f"uploads may take {most} together: delete some, or start the lab with --uploads-gib")


def _delete(request: Request, name: str) -> Any:
    lab = lab_of(request)
    path = lab.foreman.uploads / name
    if not NAME.fullmatch(name):
        raise NotThere(f"no upload is named {name[:80]!r}")
    try:
        with lab.keeping:
            found = lab.store.drop_upload(name, lambda: path.unlink(missing_ok=True))
    except UsageError as error:
        return JSONResponse(Trouble(errors=[str(error)]).model_dump(), 409)
    except OSError as error:
        raise UsageError(f"{name}: cannot be deleted ({error.strerror or error})") from None
    if found is None:
        raise NotThere(f"no upload is named {name!r}")
    return UploadView(**asdict(found))


def _uploads(request: Request) -> list[UploadView]:
    return [UploadView(**asdict(one)) for one in lab_of(request).store.uploads()]
