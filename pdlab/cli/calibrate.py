"""`pdlab calibrate`."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TimeElapsedColumn
from rich.table import Table

from pdlab.core.extras import lacks
from pdlab.core.types import UsageError
from pdlab.results.units import percent

if TYPE_CHECKING:
    from pdlab.cost.profile import InstanceProfile
    from pdlab.proof.calibrate.multipliers import Multipliers
    from pdlab.proof.calibrate.run import Say

STEP_TOKENS, SEQS, LENGTH = 2048, 256, 4096  # of a server that does not say


def calibrate(
    file: Annotated[
        Path | None, typer.Argument(metavar="[EXPERIMENT]", help="Its model and engine are measured.", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The profile: a hardware for pdlab sim.")] = Path("profile.json"),
    url: Annotated[
        str | None, typer.Option(help="Measure the server there, pdlab's or vLLM, and nothing here.", show_default=False)
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="A Hugging Face folder or a .gguf file; with --url a name of pdlab models.", show_default="the embedded SmolLM2"),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda[:i] or npu[:i].", show_default="cpu")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.", show_default="auto")] = None,
    kv_cache_dtype: Annotated[
        str | None, typer.Option(help="Of the KV cache: auto, fp8 (e4m3), bfloat16, float16 or float32.", show_default="as --dtype")
    ] = None,
    quantization: Annotated[str | None, typer.Option(help="Weight-only: wint8 or wint4.", show_default=False)] = None,
    load_format: Annotated[str | None, typer.Option(help="dummy: random weights.", show_default=False)] = None,
    kv_gib: Annotated[float | None, typer.Option(min=0.0, help="KV memory.", show_default="what fits")] = None,
    max_model_len: Annotated[int | None, typer.Option(min=1, help="Tokens of prompt and output.", show_default="the model's")] = None,
    max_seqs: Annotated[int | None, typer.Option(min=1, help="Sequences that decode together.", show_default="256")] = None,
    max_batch_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of one step.", show_default="2048")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of a CPU engine, as it will be served.", show_default="all cores")] = None,
    seconds: Annotated[float, typer.Option(min=1.0, help="For measuring steps.")] = 180.0,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: the likeliest token, which costs least.")] = 0.0,
    clock: Annotated[str, typer.Option(help="wall; or cpu, of an engine of one thread on a machine that others use.")] = "wall",
    transport: Annotated[str, typer.Option(help="Of KV transfers: auto, tcp, shm, cuda_ipc, nixl; none leaves them out.")] = "auto",
    http: Annotated[bool, typer.Option(help="Measure what the server adds.")] = True,
    beside: Annotated[bool, typer.Option(help="With --http: what two servers on one machine cost each other.")] = True,
    requests: Annotated[
        int | None, typer.Option(help="With --url: only so many, 20 at least, for multipliers of shipped step times.", show_default=False)
    ] = None,
    hardware: Annotated[str | None, typer.Option(metavar="NAME", help="With --requests: the accelerator.", show_default=False)] = None,
    engine: Annotated[str | None, typer.Option(metavar="NAME", help="With --requests: whose step times.", show_default="vllm")] = None,
    tp: Annotated[int | None, typer.Option(help="With --requests: accelerators.", show_default="1")] = None,
    seed: Annotated[int, typer.Option(help="Of the order and the prompts.")] = 0,
) -> None:
    """Measure an instance, and write a profile that an experiment can name as its hardware. With --requests: multipliers for its `cost`."""
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)  # as an engine process has it, and before torch reads it
    _check_writable(out)
    _check_short(url, requests, hardware, engine, tp)
    from pdlab.cost.profile import save_instance_profile
    from pdlab.experiment.deployment import Deployment

    try:
        from pdlab.proof.calibrate import run
        from pdlab.real.launch.instance import engine_options
    except ImportError as error:
        raise lacks("pdlab calibrate", error) from None

    plan = run.CalibrationPlan(seconds, temperature, clock, "" if transport == "none" else transport, http, beside, seed)
    console, err = Console(), Console(stderr=True)
    columns = (*Progress.get_default_columns(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        say = _say(bar)
        if url is not None:
            if file is not None:
                raise UsageError("--url measures a running server, an experiment an engine here: give one of the two")
            if requests is not None:
                made = run.multipliers_of_server(
                    url, model or "", hardware or "", engine or "vllm", tp or 1, requests, max_model_len or LENGTH, plan, say
                )
                _keep(made, out, console)
                return
            profile = run.of_server(
                url,
                model or "",
                plan,
                say,
                max_batch_tokens=max_batch_tokens or STEP_TOKENS,
                max_seqs=max_seqs or SEQS,
                max_tokens=max_model_len or LENGTH,
            )
        else:
            given = {
                "model": model,
                "device": device,
                "dtype": dtype,
                "kv_cache_dtype": kv_cache_dtype,
                "quantization": quantization,
                "load_format": load_format,
                "kv_gib": kv_gib,
                "max_model_len": max_model_len,
                "max_seqs": max_seqs,
                "max_batch_tokens": max_batch_tokens,
                "threads": threads,
            }
            deployment = Deployment.load(file) if file is not None else None
            profile = run.of_engine(engine_options(deployment, given), plan, say, file)
    save_instance_profile(profile, out)
    show(profile, console)
    console.print(f"{escape(str(out))}: write hardware: {escape(out.name)} in an experiment beside it")


def _check_short(url: str | None, requests: int | None, hardware: str | None, engine: str | None, tp: int | None) -> None:
    if requests is None:
        for option, given in (("--hardware", hardware), ("--engine", engine), ("--tp", tp)):
            if given is not None:
                raise UsageError(f"{option} is for --requests: a profile is of what is measured, whatever it runs on")
    elif url is None or hardware is None:
        missing = "--url, the server" if url is None else "--hardware, whose step times are multiplied"
        raise UsageError(f"--requests needs {missing}")


def _keep(made: Multipliers, out: Path, console: Console) -> None:
    """The multipliers as a file, and in words."""
    factors = {"prefill": round(made.prefill.value, 4), "decode": round(made.decode.value, 4)}
    kept = {"cost": {"factors": factors}, "request_s": made.request_s, "requests": made.requests}
    kept |= {"prefill": asdict(made.prefill), "decode": asdict(made.decode)}
    out.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    for name, one in (("prompts", made.prefill), ("decode steps", made.decode)):
        console.print(
            f"{name}: {one.value:.2f} times what is computed, 95 % within {one.low:.2f} to {one.high:.2f} ({one.points} points alone say "
            f"{one.measured:.2f})",
            highlight=False,
        )
        if not one.expected:
            console.print(f"[yellow]warning:[/] {name} are outside what the step times say of their own error: is it that accelerator?")
    console.print(f"besides: {made.request_s * 1e3:.1f} ms a request, which multipliers do not hold", highlight=False)
    words = f"--set 'cost.factors={{prefill: {factors['prefill']}, decode: {factors['decode']}}}'"
    console.print(f"{escape(str(out))}: use it with {escape(words)}", highlight=False, soft_wrap=True)


def show(profile: InstanceProfile, console: Console) -> None:
    """The fit's errors, the overheads, the warnings."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("held out", "points", "mean error", "worst"):
        table.add_column(name, justify="left" if name == "held out" else "right")
    for e in profile.errors:
        table.add_row(e.kind, str(e.points), percent(e.mean), percent(e.worst))
    console.print(table)
    over = profile.overheads
    routed = f" ({over.router_s * 1e3:.2f} more through a router)" if over.router_s else ""
    console.print(f"besides: {over.request_s * 1e3:.2f} ms a request{routed}, {over.token_s * 1e6:.0f} us a token")
    if (beside := profile.beside).matters:
        console.print(
            f"beside another engine's prefill and decode, a prefill of 100 tokens takes {beside.added_s(100, True) * 1e3:.1f} and "
            f"{beside.added_s(100, False) * 1e3:.1f} ms longer, a decode {beside.added_s(0, True) * 1e3:.1f} and "
            f"{beside.added_s(0, False) * 1e3:.1f}"
        )
    if over.new_size_s:
        console.print(f"the first step of a size takes {over.new_size_s * 1e3:.1f} ms longer")
    if (front := profile.front).matters:
        console.print(
            f"what serves it computes {front.request_s * 1e3:.1f} ms a request, {front.step_s * 1e6:.0f} us a step and "
            f"{front.token_s * 1e6:.0f} us a token of it"
        )
    if (moved := profile.transfer) is not None:
        console.print(
            f"transfers by {moved.transport}: {over.handoff_s * 1e3:.2f} ms + {moved.bytes_per_s / 1e9:.2f} GB/s "
            f"(mean error {percent(moved.mean_error)})"
        )
    for line in profile.warnings:
        console.print(f"[yellow]warning:[/] {escape(line)}")


def _say(bar: Progress) -> Say:
    task = bar.add_task("loading", total=1.0)

    def say(what: str, share: float) -> None:
        bar.update(task, description=what, completed=share)

    return say


def _check_writable(out: Path) -> None:
    folder = out.parent
    if out.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UsageError(f"--out {out} cannot be written: give a file in a folder that exists")
    if out.suffix != ".json":
        raise UsageError(f"--out {out} must end in .json, by which an experiment knows a profile")
