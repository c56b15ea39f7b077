"""`pdlab costs`: step times as a table, for `cost: {table: ...}`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from pdlab.cli.shared import HardwareFile, out
from pdlab.core.types import UsageError, nearest
from pdlab.cost import hardware as find
from pdlab.cost.accelerator import AcceleratorSpec
from pdlab.cost.aic import make_profile
from pdlab.cost.catalogue import understood
from pdlab.cost.dtypes import dtype_bytes
from pdlab.cost.grids import roofline_table
from pdlab.cost.measurements import BACKENDS
from pdlab.cost.parallel import Parallel
from pdlab.cost.table import Profile, save_profile
from pdlab.experiment.hardware_file import read_accelerators

app = typer.Typer(help="Step times as a table that an experiment's `cost` takes.", no_args_is_help=True)


class TimesFrom(StrEnum):
    """Where step times come from."""

    ROOFLINE = "roofline"
    KERNELS = "kernels"


@app.callback()
def costs() -> None:
    """Step times as a table that an experiment's `cost` takes."""


@app.command()
def make(
    name: Annotated[str, typer.Option("--model", metavar="NAME", help="A name, or the path of a config.json.", show_default=False)],
    hardware: Annotated[str, typer.Option(metavar="NAME", help="The accelerator.", show_default=False)],
    engine: Annotated[str, typer.Option(metavar="NAME", help="vllm, sglang, trtllm or pdlab.")] = "vllm",
    tp: Annotated[int, typer.Option(help="Accelerators that hold each layer.")] = 1,
    dp_attention: Annotated[int, typer.Option(help="Groups of them with attention of their own.")] = 1,
    ep: Annotated[int, typer.Option(help="Groups of them that share the experts out.")] = 1,
    pp: Annotated[int, typer.Option(help="Pipeline stages.")] = 1,
    weight_dtype: Annotated[
        str | None, typer.Option(metavar="DTYPE", help="Of the weights, in place of the model's.", show_default=False)
    ] = None,
    kv_dtype: Annotated[str | None, typer.Option(metavar="DTYPE", help="Of the KV cache.", show_default=False)] = None,
    source: Annotated[
        TimesFrom,
        typer.Option(help="pdlab's own figures, or the kernels of aiconfigurator-core (the extra aic, whose names --model takes then)."),
    ] = TimesFrom.ROOFLINE,
    path: Annotated[Path, typer.Option("--out", metavar="FILE", help="The table.")] = Path("costs.json"),
    hardware_file: HardwareFile = None,
) -> None:
    """Write a table of step times, of one instance of a model on accelerators under an engine."""
    if engine not in BACKENDS:
        raise UsageError(f"--engine {engine!r} is none of {', '.join(BACKENDS)}{nearest(engine, BACKENDS)}")
    for dtype in (weight_dtype, kv_dtype):
        if dtype is not None:
            dtype_bytes(dtype)
    parallel = Parallel(tp=tp, dp_attention=dp_attention, ep=ep, pp=pp)
    if source is TimesFrom.KERNELS:
        table = _of_kernels(name, hardware, engine, parallel, weight_dtype, kv_dtype)
    else:
        written = {} if hardware_file is None else read_accelerators(hardware_file)
        chip = find(AcceleratorSpec.model_validate(written[hardware])) if hardware in written else find(hardware)
        table = roofline_table(understood(name, Path()).model, chip, engine, parallel, weight_dtype, kv_dtype)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_profile(table, path)
    except OSError as error:
        raise UsageError(f"--out {path}: {error.strerror}") from None
    for line in (f"rests on  {table.source}", f"table     {path}: {table.name}", f"use it    --set cost.table={path.resolve()}"):
        out.print(line, highlight=False, soft_wrap=True, markup=False)


def _of_kernels(name: str, hardware: str, engine: str, parallel: Parallel, weight_dtype: str | None, kv_dtype: str | None) -> Profile:
    """Raises UsageError where aiconfigurator is asked for what this does not pass on, or has no answer."""
    given = {"--dp-attention": parallel.dp_attention > 1, "--ep": parallel.ep > 1, "--pp": parallel.pp > 1}
    given |= {"--weight-dtype": weight_dtype is not None, "--kv-dtype": kv_dtype is not None}
    for option in (key for key, there in given.items() if there):
        raise UsageError(f"{option} is not passed on to the kernels' data base: leave it out, or take --source roofline")
    return make_profile(name, hardware.removesuffix("-80gb").replace("-", "_"), engine, parallel.tp)
