"""`pdlab tokenizer`: a model's vocabulary as the folder that other programs want."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pdlab.core.types import UsageError
from pdlab.real.launch.instance import model_path
from pdlab.real.models.tokenizer import Tokenizer
from pdlab.results.staged import staged

app = typer.Typer(help="Look after a model's vocabulary.", no_args_is_help=True)


@app.callback()
def _several() -> None:
    """So that `export` is a command, though it is the only one."""


@app.command("export")
def command(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Made where it is not there.", show_default=False)],
    model: Annotated[
        str, typer.Option(help="A Hugging Face folder or a .gguf file.", show_default="the embedded SmolLM2-135M-Instruct")
    ] = "",
) -> None:
    """Write a folder that transformers' AutoTokenizer loads, for clients and benchmarks that want the tokenizer of a served model."""
    tokenizer = Tokenizer.load(Path(model_path(model, Path())))
    where = export(tokenizer, directory)
    print(f"{where}: {tokenizer.vocab:,} tokens of {tokenizer.source}; AutoTokenizer.from_pretrained({str(where)!r}) loads them")


def export(tokenizer: Tokenizer, directory: Path) -> Path:
    """Its files, all or none; others that are there stay. Raises UsageError where they cannot be written."""
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"{directory} is a file: name a folder")
    with staged(directory, "give another folder") as aside:
        for name, text in tokenizer.files().items():
            (aside / name).write_text(text, encoding="utf-8")
        directory.mkdir(exist_ok=True)
        for file in aside.iterdir():
            file.replace(directory / file.name)
    return directory
