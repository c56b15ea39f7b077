"""`pdlab import`: other systems' launch commands as an experiment file and `pdlab serve` commands."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from pdlab.core.types import UsageError
from pdlab.experiment.imports.experiment_file import Instead
from pdlab.experiment.imports.importing import Imported, imported
from pdlab.experiment.imports.launches import BEGINS
from pdlab.experiment.imports.shell import Script, of_words, read, shown

DOCUMENTS = (".md", ".markdown", ".rst", ".txt")

app = typer.Typer(
    help="Read launch commands of xLLM, FastDeploy, Llumnix, vLLM, SGLang or Dynamo; write the experiment and the pdlab serve commands.",
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def import_commands(
    command: Annotated[
        list[str] | None, typer.Argument(metavar="[-- COMMAND...]", help="One command, or several with ';' between.", show_default=False)
    ] = None,
    from_file: Annotated[
        Path | None,
        typer.Option(metavar="SCRIPT", help="A shell script, or a document (.md, .txt) with shell blocks; -: stdin.", show_default=False),
    ] = None,
    to: Annotated[Path | None, typer.Option(metavar="YAML", help="Where the experiment is written.", show_default="stdout")] = None,
    model: Annotated[str, typer.Option(help="Serve this model in place of the commands'.", show_default=False)] = "",
    device: Annotated[str, typer.Option(help="Run on this device in place of theirs, such as cpu.", show_default=False)] = "",
    hardware: Annotated[str, typer.Option(help="Of all instances, so that the file can be simulated, too.", show_default=False)] = "",
    strict: Annotated[bool, typer.Option("--strict", help="A mistake in the commands ends it; nothing is written.")] = False,
) -> None:
    """Nothing is run. Flags that have no meaning here are told one by one, and so are the commands' own mistakes, with their lines."""
    if (from_file is None) is not bool(command):
        raise UsageError("give either --from-file SCRIPT, or -- and a command")
    source = str(from_file) if from_file is not None and str(from_file) != "-" else "stdin" if from_file is not None else "a command"
    script = _script(from_file) if from_file is not None else of_words(command or [], os.environ)
    _check_target(to)
    try:
        found = imported(
            script,
            source,
            str(to) if to is not None else "exp.yaml",
            Instead(model, device, hardware, to.parent if to is not None else Path()),
        )
    except UsageError as error:
        raise UsageError("\n".join(f"{source}: {line}" for line in str(error).splitlines())) from None
    if strict and found.mistakes:
        raise UsageError("\n".join(f"{source}:{one.line}: {one.text}" for one in found.mistakes))
    if to is not None:
        try:
            to.write_text(found.yaml, encoding="utf-8")
        except OSError as error:
            raise UsageError(f"--to {to}: {error.strerror}") from None
    typer.echo("\n".join(_told(found, source, to)))


def _script(path: Path) -> Script:
    """Raises UsageError where it cannot be read."""
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--from-file {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"--from-file {path}: not a text file") from None
    return read(shown(text, BEGINS) if path.suffix.lower() in DOCUMENTS else text, os.environ)


def _check_target(to: Path | None) -> None:
    if to is not None and to.exists():
        raise UsageError(f"--to {to}: it is there already: remove it, or name another")


def _told(found: Imported, source: str, to: Path | None) -> list[str]:
    lines = found.yaml.splitlines() if to is None else [f"# {to} is written"]
    lines += ["", "# Start it:", *map(str, found.commands)]
    lines += ["", "# Mistakes in the commands:"] * bool(found.mistakes)
    lines += [f"#   {f'{source}:{one.line}: ' if one.line else ''}{one.text}" for one in found.mistakes]
    lines += ["", "# To know:"] * bool(found.notes)
    lines += [f"#   {f'{source}:{one.line}: ' if one.line else ''}{one.text}" for one in found.notes]
    lines += ["", "# Not carried over:"] * bool(found.dropped)
    lines += [f"#   {source}:{one.line}: {one}" for one in found.dropped]
    if "workload" not in found.mapping:
        lines += ["", "# pdlab sim needs a workload, and hardware of each instance: give --hardware (pdlab hardware lists them)"]
    return lines
