"""The command line. It reads files and options, shows progress, and prints; what it runs is in the modules it imports when asked to.

A `UsageError` becomes its own lines on stderr and exit status 2, never a traceback; Ctrl-C keeps what there is, and exits with 130.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from traceback import print_exception
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pdlab import __version__
from pdlab.cli.bench import bench
from pdlab.cli.calibrate import calibrate
from pdlab.cli.compare import compare
from pdlab.cli.models import app as models
from pdlab.cli.tokenizer import app as tokenizer
from pdlab.cli.validate import validate
from pdlab.core.extras import lacks
from pdlab.core.types import UsageError
from pdlab.experiment import spellings
from pdlab.real.net.credentials import from_file, kept_token, registry_url
from pdlab.real.net.tls import CA_CERTS, Tls

if TYPE_CHECKING:
    from pdlab.experiment.deployment import Deployment
    from pdlab.experiment.experiment import Experiment
    from pdlab.report.result import Result

Progress = Callable[[float, int, int], None]
LEAST_LOG_BYTES = 1 << 12  # that are kept of an event log for whose results a disk has no room
DECISIONS = b'{"kv_blocks":'  # what an engine's decision log begins with

Token = Annotated[
    str,
    typer.Option(
        "--internal-token",
        envvar="PDLAB_INTERNAL_TOKEN",
        callback=from_file("PDLAB_INTERNAL_TOKEN"),
        help="Shared by a cluster's processes (better: PDLAB_INTERNAL_TOKEN_FILE).",
        show_default=False,
    ),
]
CaCerts = Annotated[
    str, typer.Option("--ssl-ca-certs", metavar="PEM", envvar=CA_CERTS, help="Whom to believe.", show_default="the system's")
]
app = typer.Typer(
    help="How should prefill and decode be split over my machines, and which policy should run them?",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
out = Console()
err = Console(stderr=True)


Traceback = Annotated[bool, typer.Option("--traceback", help="Where a policy fails, show all that Python says of it.")]


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point. Exits with 0, with 2 where the user has made a mistake, with 130 after Ctrl-C."""
    try:
        spellings.check(sys.argv[1:] if arguments is None else arguments)
        app(args=arguments, prog_name="pdlab")
    except UsageError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        sys.exit(2)


def _version(asked: bool) -> None:
    if asked:
        print(f"pdlab {__version__}")
        raise typer.Exit


@app.callback()
def _root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False) -> None:
    pass


@app.command()
def sim(
    files: Annotated[list[Path], typer.Argument(metavar="FILE", help="Experiment files; several are compared.", show_default=False)],
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY.PATH=VALUE", help="Replace a value of the file.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="In place of the file's.", show_default=False)] = None,
    requests: Annotated[int | None, typer.Option(help="Short for --set workload.requests=N.", show_default=False)] = None,
    out_dir: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Where results go.", show_default="out/NAME")] = None,
    trace_events: Annotated[bool, typer.Option("--trace-events", help="Keep the event log, and a Perfetto trace.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON, not as a table.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors (and --json).")] = False,
    traceback: Traceback = False,
) -> None:
    """Simulate experiments: progress, one table each, a comparison of several; results in DIR."""
    with _traced(traceback):
        _sim(files, list(set_ or ()), seed, requests, out_dir, trace_events, as_json, quiet)


@contextmanager
def _traced(asked: bool) -> Iterator[None]:
    """A mistake's whole story before its line, where that was asked for."""
    try:
        yield
    except UsageError as error:
        if asked:
            print_exception(error)
        raise


def _sim(
    files: list[Path],
    overrides: list[str],
    seed: int | None,
    requests: int | None,
    out_dir: Path | None,
    trace_events: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    if seed is not None:
        overrides.append(f"seed={seed}")
    if requests is not None:
        overrides.append(f"workload.requests={requests}")
    experiments = _load(files, overrides)
    if not quiet:
        for line in dict.fromkeys(experiment.ignored for experiment in experiments):
            if line:
                err.print(line, highlight=False, soft_wrap=True, markup=False)
    directories = _directories(experiments, out_dir)
    for directory in directories:
        _check_writable(directory)
    results: list[tuple[str, Result]] = []
    for experiment, directory in zip(experiments, directories, strict=True):
        try:
            result = _simulate(experiment, directory, trace_events, quiet)
        except KeyboardInterrupt:
            err.print(f"interrupted: nothing of {experiment.name} was kept")
            raise typer.Exit(130) from None
        except _Unsaved as unsaved:
            _tell(unsaved.result, as_json, quiet)
            raise
        results.append((directory.name, result))
        if not (quiet or as_json):
            _show(result, directory)
        if result.summary["partial"]:
            break
    if as_json:
        summaries = [result.summary for _, result in results]
        print(json.dumps(summaries[0] if len(files) == 1 else summaries, indent=2))
    elif len(results) > 1 and not quiet:
        from pdlab.report.tables import comparison

        out.print(comparison([(name, result.summary) for name, result in results]))
    if any(result.summary["partial"] for _, result in results):
        err.print("interrupted: these results are partial, and marked so")
        raise typer.Exit(130)


def _load(files: Sequence[Path], overrides: Sequence[str]) -> list[Experiment]:
    """All files, before any is run. Raises UsageError with the mistakes of all."""
    from pdlab.experiment.experiment import Experiment

    found, wrong = [], []
    for file in files:
        try:
            found.append(Experiment.load(file, overrides))
        except UsageError as error:
            wrong.append(error)
    if wrong:
        raise UsageError("\n".join(dict.fromkeys(line for error in wrong for line in str(error).splitlines()))) from wrong[0].__cause__
    return found


def _served(file: Path) -> Deployment:
    """The deployment in a file. Raises UsageError, also where it is a model in its place."""
    if file.suffix == ".gguf" or (file / "config.json").is_file():
        raise UsageError(f"{file} is a model: give it as --model {file}")
    if not file.exists() and spellings.of_hub(str(file)):
        raise UsageError(f"{file}: there is no such file; as for a model of that name, {spellings.download(str(file), serve=True)}")
    from pdlab.experiment.deployment import Deployment

    return Deployment.load(file)


def _directories(experiments: Sequence[Experiment], given: Path | None) -> list[Path]:
    """Where each one's results go: DIR itself for one, DIR/NAME for several; a name that is there twice gets a number."""
    if given is not None and len(experiments) == 1:
        return [given]
    names: list[str] = []
    for experiment in experiments:
        name, number = experiment.name, 2
        while name in names:
            name, number = f"{experiment.name}-{number}", number + 1
        names.append(name)
    return [(given or Path("out")) / name for name in names]


def _simulate(experiment: Experiment, directory: Path, trace_events: bool, quiet: bool) -> Result:
    """Run one, and keep its files: all of them or, on a UsageError, none."""
    from pdlab.sim import simulate

    log = directory.parent / f".{directory.name}.events.jsonl.partial-{os.getpid()}"  # another run may go to the same folder
    if trace_events:
        _make_folder(directory.parent)
    try:
        with _progress(experiment.name, quiet) as progress:
            result = simulate(experiment, progress=progress, trace_events=log if trace_events else None)
        try:
            if not trace_events:
                result.save(directory)
                return result
            cut = _save_beside(log, result, directory)
            log.replace(directory / "events.jsonl")
        except UsageError as error:
            raise _Unsaved(str(error), result) from None
        stopped = next((line for line in result.summary["warnings"] if line.startswith("the event log stopped")), "")
        if stopped or cut:
            stopped = stopped or "the event log's end had to give way to the results (No space left on device)"
            err.print(f"{directory / 'events.jsonl'}: {stopped}", highlight=False, soft_wrap=True, markup=False)
    except OSError as error:
        raise UsageError(f"{directory}: cannot write there ({error.strerror}); give another directory with --out") from None
    finally:
        if trace_events:
            log.unlink(missing_ok=True)
    return result


class _Unsaved(UsageError):
    """A run is over, and its files cannot be written."""

    def __init__(self, line: str, result: Result) -> None:
        super().__init__(line)
        self.result = result


def _tell(result: Result, as_json: bool, quiet: bool) -> None:
    """The summary, which is all that is left of a run whose files have no place."""
    from pdlab.report.tables import summary_table

    if as_json:
        print(json.dumps(result.summary, indent=2))
    elif not quiet:
        out.print(summary_table(result.summary, result.name))


def _save_beside(log: Path, result: Result, directory: Path) -> bool:
    """Save a result where its event log lies already. On a disk without room for both the log's end gives way: True."""
    from pdlab.replay.log import cut_to_lines

    cut = False
    while True:
        try:
            result.save(directory)
            return cut
        except UsageError as error:
            size = log.stat().st_size
            if os.strerror(errno.ENOSPC) not in str(error) or size < LEAST_LOG_BYTES:
                raise
            cut_to_lines(log, size // 2)
            cut = True


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder}: cannot be made ({error.strerror}); give another directory with --out") from None


def _check_writable(directory: Path) -> None:
    """Before an hour is spent on results that have nowhere to go. Raises UsageError."""
    there = directory.absolute()
    while not there.exists():
        there = there.parent
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise UsageError(f"{directory}: cannot write there; give another directory with --out")


@contextmanager
def _progress(name: str, quiet: bool) -> Iterator[Progress | None]:
    """A bar on stderr: simulated time, requests, requests a second. Nothing where nobody looks."""
    if quiet or not err.is_terminal:
        yield None
        return
    from rich import progress as bars

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TextColumn("requests  {task.fields[speed]}  simulated {task.fields[now]}"),
        bars.TimeElapsedColumn(),
    )
    with bars.Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task(escape(name), total=None, speed="", now="0 s")

        def update(now_s: float, ended: int, total: int) -> None:
            elapsed_s = bar.tasks[0].elapsed or 0.0
            speed = f"{ended / elapsed_s:,.0f}/s" if elapsed_s > 0.0 else ""
            bar.update(task, completed=ended, total=total, now=f"{now_s:,.0f} s", speed=speed)

        yield update


def _show(result: Result, directory: Path) -> None:
    from pdlab.report.tables import summary_table

    out.print(summary_table(result.summary, result.name))
    out.print(f"picture  {directory / 'report.html'}", highlight=False, soft_wrap=True, markup=False)
    others = sorted(file.name for file in directory.iterdir() if file.name != "report.html" and not file.name.startswith("."))
    out.print(f"files    {directory}: {', '.join(others)}", highlight=False, soft_wrap=True, markup=False)


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def trace(context: typer.Context) -> None:
    """Look at a workload, convert one, or make one: stats, convert, synth."""
    from pdlab.cli.trace import app as trace_app

    trace_app(args=context.args or ["--help"], prog_name="pdlab trace")


@app.command()
def serve(
    file: Annotated[
        Path | None, typer.Argument(metavar="[EXPERIMENT]", help="Its model and engine are served.", show_default=False)
    ] = None,
    role: Annotated[
        str, typer.Option(help="mixed (prefills and decodes), prefill or decode; router; all: the file's instances and their router.")
    ] = "mixed",
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "--model-path", help="A Hugging Face folder or a .gguf file.", show_default="the embedded SmolLM2-135M-Instruct"
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda[:i] or npu[:i].", show_default="cpu")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.", show_default="auto")] = None,
    quantization: Annotated[str | None, typer.Option(help="Weight-only: wint8 or wint4.", show_default=False)] = None,
    load_format: Annotated[str | None, typer.Option(help="dummy: random weights.", show_default=False)] = None,
    kv_gib: Annotated[float | None, typer.Option(min=0.0, help="KV memory.", show_default="what fits")] = None,
    hbm_utilization: Annotated[
        float | None,
        typer.Option(
            "--hbm-utilization",
            "--gpu-memory-utilization",
            "--mem-fraction-static",
            min=0.0,
            max=1.0,
            help="The part of the memory that may be used.",
            show_default="0.9",
        ),
    ] = None,
    max_model_len: Annotated[
        int | None,
        typer.Option("--max-model-len", "--context-length", min=1, help="Tokens of prompt and output.", show_default="the model's"),
    ] = None,
    max_seqs: Annotated[
        int | None,
        typer.Option(
            "--max-seqs", "--max-num-seqs", "--max-running-requests", min=1, help="Sequences that decode together.", show_default="256"
        ),
    ] = None,
    max_batch_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-batch-tokens",
            "--max-num-batched-tokens",
            "--chunked-prefill-size",
            min=1,
            help="Tokens that one step computes.",
            show_default="8192",
        ),
    ] = None,
    block_tokens: Annotated[
        int | None,
        typer.Option("--block-tokens", "--block-size", "--page-size", min=1, help="Tokens in a KV block.", show_default="16"),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of a CPU engine.", show_default="all cores")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8000,
    name: Annotated[str, typer.Option("--served-model-name", help="What clients call the model.", show_default=False)] = "",
    tokenizer: Annotated[
        Path | None,
        typer.Option("--tokenizer", "--tokenizer-path", help="Folder or .gguf with the vocabulary.", show_default="the model's"),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="PDLAB_API_KEY",
            callback=from_file("PDLAB_API_KEY"),
            help="Clients have to send it (better: PDLAB_API_KEY_FILE).",
            show_default=False,
        ),
    ] = None,
    max_requests: Annotated[int, typer.Option(min=1, help="In flight; more get 429.")] = 1024,
    drain_s: Annotated[float, typer.Option(min=0.0, help="At SIGTERM, time for running requests to end.")] = 30.0,
    tool_call_parser: Annotated[
        str | None, typer.Option(help="How the model calls tools: hermes or llama3_json.", show_default="as its chat template shows")
    ] = None,
    auto_tool_choice: Annotated[
        bool | None,
        typer.Option(
            "--enable-auto-tool-choice/--no-enable-auto-tool-choice",
            help="Read calls of tools from the text.",
            show_default="where the chat template shows how",
        ),
    ] = None,
    idle_timeout_s: Annotated[
        float, typer.Option(min=1.0, help="A client that takes nothing of its answer for so long is hung up on.")
    ] = 300.0,
    allowed_origins: Annotated[
        str, typer.Option(metavar="ORIGINS", help="Web pages that may ask from a browser (CORS); *: all.", show_default="none")
    ] = "",
    allowed_methods: Annotated[str, typer.Option(metavar="METHODS", help="That they may use.")] = "*",
    allowed_headers: Annotated[str, typer.Option(metavar="HEADERS", help="That they may send.")] = "*",
    allow_credentials: Annotated[bool, typer.Option("--allow-credentials", help="They may send cookies and the like.")] = False,
    decisions: Annotated[Path | None, typer.Option("--log", help="File for the scheduler's decisions.", show_default=False)] = None,
    registry: Annotated[
        str,
        typer.Option(
            envvar="PDLAB_REGISTRY",
            callback=registry_url,
            help="Where instances and routers meet: etcd://, etcds://, redis:// or rediss://.",
            show_default=False,
        ),
    ] = "",
    registry_wait_s: Annotated[float, typer.Option(min=0.0, help="How long a start waits for a registry that is away.")] = 60.0,
    instance_name: Annotated[str, typer.Option(help="Of this instance or router.", show_default="role-host-pid")] = "",
    advertise: Annotated[str, typer.Option(metavar="HOST", help="What others reach it by.", show_default="--host")] = "",
    kv_transport: Annotated[str, typer.Option(help="auto, shm, tcp, cuda_ipc or nixl.")] = "auto",
    kv_port: Annotated[int, typer.Option(min=0, max=65535, help="For KV transfers; 0: any free one.")] = 0,
    token: Token = "",
    engine: Annotated[str, typer.Option(help="pdlab, or vllm: a server at --upstream is registered.")] = "pdlab",
    upstream: Annotated[str, typer.Option(metavar="URL", help="Of the vLLM server.", show_default=False)] = "",
    upstream_api_key: Annotated[
        str,
        typer.Option(
            envvar="PDLAB_UPSTREAM_API_KEY",
            callback=from_file("PDLAB_UPSTREAM_API_KEY"),
            help="Of vLLM servers; a router needs it, too.",
            show_default=False,
        ),
    ] = "",
    certfile: Annotated[str, typer.Option("--ssl-certfile", metavar="PEM", help="Serve https, with this.", show_default=False)] = "",
    keyfile: Annotated[str, typer.Option("--ssl-keyfile", metavar="PEM", help="The certificate's key.", show_default=False)] = "",
    ca_certs: CaCerts = "",
    trace_events: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The router's event log, for replay.", show_default=False)
    ] = None,
    no_self_profile: Annotated[
        bool, typer.Option("--no-self-profile", help="An instance does not measure its own steps (2 to 3 s) before it joins a cluster.")
    ] = False,
    log_level: Annotated[str, typer.Option(envvar="PDLAB_LOG_LEVEL", help="debug, info, warning or error.")] = "info",
    log_format: Annotated[str, typer.Option(envvar="PDLAB_LOG_FORMAT", help="text, or json: an object a line.")] = "text",
    traceback: Traceback = False,
) -> None:
    """Serve a model over the OpenAI API, with the simulator's own scheduler and policies: one server, or a cluster's parts."""
    try:
        from pdlab.real.api.cors import cors_of
        from pdlab.real.host.logs import configured
        from pdlab.real.launch.instance import Listening
        from pdlab.real.launch.serve import Asked, start
    except ImportError as error:
        raise lacks("pdlab serve", error) from None
    given = {
        "model": model,
        "device": device,
        "dtype": dtype,
        "quantization": quantization,
        "load_format": load_format,
        "kv_gib": kv_gib,
        "max_model_len": max_model_len,
        "hbm_utilization": hbm_utilization,
        "max_seqs": max_seqs,
        "max_batch_tokens": max_batch_tokens,
        "block_tokens": block_tokens,
        "threads": threads,
        "decisions": None if decisions is None else str(decisions),
    }
    asked = Asked(
        role=role,
        file=file,
        deployment=_served(file) if file is not None else None,
        given=given,
        serving=Listening(
            host=host,
            port=port,
            served_name=name,
            tokenizer=tokenizer,
            api_key=api_key,
            token=token,
            max_requests=max_requests,
            drain_s=drain_s,
            tool_call_parser=tool_call_parser,
            auto_tool_choice=auto_tool_choice,
            tls=Tls(certfile, keyfile, ca_certs),
            idle_s=idle_timeout_s,
            cors=cors_of(allowed_origins, allowed_methods, allowed_headers, allow_credentials),
        ),
        registry=registry,
        registry_wait_s=registry_wait_s,
        instance_name=instance_name,
        advertise=advertise,
        kv_transport=kv_transport,
        kv_port=kv_port,
        engine=engine,
        upstream=upstream,
        upstream_api_key=upstream_api_key,
        trace_events=trace_events,
        traceback=traceback,
        self_profile=not no_self_profile,
    )
    with (
        configured(log_level, log_format, instance=instance_name or (role if role in ("router", "all") else "")) as say,
        _traced(traceback),
    ):
        start(asked, say)


Registry = Annotated[
    str | None, typer.Option("--registry", metavar="URL", help="etcd://, etcds://, redis:// or rediss://.", show_default=False)
]
RouterUrl = Annotated[str | None, typer.Option("--router", metavar="URL", help="A running router, as of --role all.", show_default=False)]
NoWait = Annotated[bool, typer.Option("--no-wait", help="Return at once.")]
Force = Annotated[bool, typer.Option("--force", help="Even where nobody else has its role.")]
InstanceName = Annotated[str, typer.Argument(metavar="INSTANCE", show_default=False)]


@app.command()
def status(
    registry: Registry = None,
    router: RouterUrl = None,
    token: Token = "",
    ca_certs: CaCerts = "",
    watch: Annotated[bool, typer.Option("--watch", help="Again each second, until Ctrl-C.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As an object, not as a table; with --watch one a line.")] = False,
) -> None:
    """A cluster's instances: their roles, load and KV, who was refused and why, and which router leads."""
    cluster, registry, token, tls = _operator(registry, router, token, ca_certs)
    show = cluster.show_json if as_json else cluster.show
    cluster.run(show(registry, router, token, out, watch, tls))


@app.command()
def drain(
    instance: InstanceName,
    registry: Registry = None,
    router: RouterUrl = None,
    token: Token = "",
    ca_certs: CaCerts = "",
    no_wait: NoWait = False,
    force: Force = False,
) -> None:
    """Let an instance finish what it has, and leave."""
    cluster, registry, token, tls = _operator(registry, router, token, ca_certs)

    async def ask(views: Any) -> str:
        return str(await cluster.drain(views, instance, token, force=force, wait=not no_wait, tls=tls))

    cluster.run(cluster.command(registry, router, token, ask, tls))


@app.command()
def switch(
    instance: InstanceName,
    role: Annotated[str, typer.Argument(help="prefill, decode or mixed.", show_default=False)],
    registry: Registry = None,
    router: RouterUrl = None,
    token: Token = "",
    ca_certs: CaCerts = "",
    no_wait: NoWait = False,
    force: Force = False,
) -> None:
    """Let an instance finish what it has, and change its role."""
    from pdlab.core.types import Role, nearest

    if role not in list(Role):
        raise UsageError(f"role {role!r} is not one of {', '.join(Role)}{nearest(role, list(Role))}")
    cluster, registry, token, tls = _operator(registry, router, token, ca_certs)

    async def ask(views: Any) -> str:
        return str(await cluster.switch(views, instance, Role(role), token, force=force, wait=not no_wait, tls=tls))

    cluster.run(cluster.command(registry, router, token, ask, tls))


def _operator(registry: str | None, router: str | None, token: str, ca_certs: str) -> tuple[ModuleType, str | None, str, Tls]:
    """The module; the registry, or the environment's; the token, or that of this user's own cluster behind `router`; whom to believe."""
    try:
        from pdlab.real.router import status as found
    except ImportError as error:
        raise lacks("this command", error) from None
    tls = Tls(ca_certs=ca_certs)
    tls.check()
    if router is None:
        registry = registry_url(registry or os.environ.get("PDLAB_REGISTRY") or None)
    return found, registry, token or (kept_token(router) if router else ""), tls


for command in (calibrate, bench, compare, validate):
    app.command()(command)
app.add_typer(tokenizer, name="tokenizer")


@app.command()
def replay(
    log: Annotated[
        Path,
        typer.Argument(
            metavar="LOG",
            help="events.jsonl of sim, the file of serve --trace-events, or serve --log.",
            exists=True,
            dir_okay=False,
            show_default=False,
        ),
    ],
    policy: Annotated[
        str | None, typer.Option(metavar="OTHER", help="Where would this one have decided otherwise? As in YAML.", show_default=False)
    ] = None,
) -> None:
    """Feed a log's events to a fresh router, an engine's to a fresh scheduler: it must act the same. Exit 1 where it does not."""
    from pdlab.experiment.experiment import read_back
    from pdlab.experiment.make_router import router
    from pdlab.policies import load as load_policy
    from pdlab.replay.log import read
    from pdlab.replay.log import replay as replay_log

    with log.open("rb") as lines:
        of_engine = lines.readline().startswith(DECISIONS)
    if of_engine:
        if policy is not None:
            raise UsageError("--policy is for a router's log; this is an engine's")
        _replay_decisions(log)
        return
    if policy is not None:
        _replay_beside(log, policy)
        return
    head, entries = read(log)
    fresh = router(read_back(head.experiment, str(log)), hash_tokens=head.hash_tokens)
    if load_policy.source_hash(fresh.policy) != head.policy_hash:
        err.print("the policy's source has changed since this log was written", style="yellow")
    events, differences = replay_log(entries, fresh)
    for difference in differences[:10]:
        print(f"{log}: line {difference.line}, {difference.now:.6f} s, {difference.event}")
        print(f"  logged    {difference.logged}\n  replayed  {difference.replayed}")
    print(f"{events:,} events replayed, {len(differences):,} differ")
    if differences:
        raise typer.Exit(1)


def _replay_beside(log: Path, policy: str) -> None:
    import yaml

    from pdlab.replay.what_if import beside
    from pdlab.results.units import percent

    try:
        other = yaml.safe_load(policy)
    except yaml.YAMLError as error:
        raise UsageError(f"--policy {policy}: {' '.join(str(error).split())}") from None
    shadow, events, differences = beside(log, other)
    for departure in shadow.departures[:20]:
        whose = "" if departure.request_id is None else f" request {departure.request_id}"
        print(f"{departure.now:.6f} s  {departure.hook}{whose}: {departure.decided}, other: {departure.other}")
    if len(shadow.departures) > 20:
        print(f"... and {len(shadow.departures) - 20:,} more")
    parted = Counter(departure.hook for departure in shadow.departures)
    for hook, asked in shadow.asked.items():
        print(f"{hook}: asked {asked:,} times, {parted[hook]:,} answers differ ({percent(parted[hook] / asked)})")
    print(f"{events:,} events replayed, {len(differences):,} differ")
    if differences:
        raise typer.Exit(1)


def _replay_decisions(log: Path) -> None:
    from pdlab.replay import scheduler_log as decisions

    with log.open("rb") as lines:
        alike, difference = decisions.replay(lines)
    print(f"{alike:,} batches decided alike{', then ' + difference if difference else ''}")
    if difference:
        raise typer.Exit(1)


@app.command()
def schema(
    as_table: Annotated[bool, typer.Option("--table", help="In its place, in Markdown: which world uses which key.")] = False,
) -> None:
    """The experiment file's JSON schema, for editors: `pdlab schema > experiment.schema.json`."""
    from pdlab.experiment.schema import schema as whole
    from pdlab.experiment.table import table

    if as_table:
        print(table())
        return

    print(json.dumps(whole(), indent=2))


@app.command()
def policies() -> None:
    """The built-in policies: which hooks each one answers, and how it decides."""
    from pdlab.core.policy import HOOKS, Policy
    from pdlab.policies import load as load_policy

    table = _plain("policy", "decides", "how")
    for name in load_policy.names():
        cls = load_policy.policy_class(name, Path())
        hooks = [hook for hook in HOOKS if getattr(cls, hook) is not getattr(Policy, hook)]
        table.add_row(name, ", ".join(hooks), _first_sentence(sys.modules[cls.__module__].__doc__ or ""))
    out.print(table)


app.add_typer(models, name="models")


@app.command()
def hardware() -> None:
    """The accelerators known by name. Unverified figures were recalled, not read from a primary source."""
    from pdlab.cost import hardware as find
    from pdlab.cost import hardware_names

    table = _plain("accelerator", "vendor", "memory", "bandwidth", "bf16 peak", "NIC", "", right=(2, 3, 4, 5))
    for name in hardware_names():
        h = find(name)
        figures = (f"{h.hbm_bytes / 2**30:,.0f} GiB", f"{h.hbm_bytes_per_s / 1e12:.2f} TB/s", f"{h.bf16_flops / 1e12:,.0f} TFLOP/s")
        table.add_row(name, h.vendor, *figures, f"{h.nic_bytes_per_s / 1e9:g} GB/s", "" if h.verified else "unverified")
    out.print(table)


def _plain(*columns: str, right: Sequence[int] = ()) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index in right else "left", no_wrap=index == 0)
    return table


def _first_sentence(text: str) -> str:
    words = " ".join(text.split())
    head, stop, _ = words.partition(". ")
    return escape(head + ("." if stop else ""))
