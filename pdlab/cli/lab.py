"""`pdlab lab`: experiments over HTTP, and in a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pdlab.cli.shared import Jobs, RayAddress, Token
from pdlab.lab.foreman import JobLimits
from pdlab.lab.serve import serve
from pdlab.lab.settings import GIB, TOKEN, LabSettings, registries_of, routers_of
from pdlab.real.net.credentials import from_file
from pdlab.search.pool import usable_cores


def lab(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8800,
    out_dir: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where results and uploads go.")] = Path("out/lab"),
    db: Annotated[str, typer.Option("--db", metavar="URL", help="sqlite:///path or postgresql://.", show_default="DIR/lab.db")] = "",
    jobs: Jobs = None,
    ray: RayAddress = None,
    router: Annotated[
        list[str] | None,
        typer.Option("--router", metavar="[NAME=]URL", help="A running cluster's router, to be watched; several.", show_default=False),
    ] = None,
    registry: Annotated[
        list[str] | None,
        typer.Option("--registry", metavar="[NAME=]URL", help="A running cluster's registry, in place of its router.", show_default=False),
    ] = None,
    router_token: Token = "",
    token: Annotated[
        str,
        typer.Option(
            "--token",
            envvar=TOKEN,
            callback=from_file(TOKEN),
            help=f"Clients have to send it (better: {TOKEN}_FILE).",
            show_default=False,
        ),
    ] = "",
    allow_code: Annotated[bool, typer.Option("--allow-code", help="Take uploads of policies, which are code, and run them.")] = False,
    max_queued: Annotated[int, typer.Option("--max-queued", help="Jobs that wait; more get 429.")] = 1000,
    job_time_s: Annotated[float, typer.Option("--job-time-s", help="That one job may take.")] = 3600.0,
    job_silence_s: Annotated[
        float, typer.Option("--job-silence-s", help="That may pass between two words of a job; then it is run again, once.")
    ] = 1800.0,
    job_gib: Annotated[float, typer.Option("--job-gib", help="Memory that one job may take.")] = 8.0,
    uploads_gib: Annotated[float, typer.Option("--uploads-gib", help="That all uploads together may take.")] = 10.0,
) -> None:
    """Experiments over HTTP, kept in a database and run by a pool of processes: API at /docs, pages at /."""
    serve(
        LabSettings(
            folder=out_dir,
            db=db,
            host=host,
            port=port,
            jobs=usable_cores() if jobs is None else jobs,
            ray=ray,
            token=token,
            routers=routers_of(router or []),
            registries=registries_of(registry or []),
            router_token=router_token,
            allow_code=allow_code,
            most_queued=max_queued,
            most_uploads_bytes=uploads_gib * GIB,
            limits=JobLimits(job_time_s, job_gib * GIB, job_silence_s),
        )
    )
