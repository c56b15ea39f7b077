"""The command line: which commands there are, and the exit statuses of all.

A command is a file of this folder, with a function or a Typer app in it; it is imported when it is asked for, so that none waits for what
another needs. A `UsageError` becomes its own lines on stderr and exit status 2, never a traceback; Ctrl-C keeps what there is, and exits
with 130.
"""

from __future__ import annotations

import ast
import errno
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from inspect import cleandoc
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from pdlab import __version__
from pdlab.core.extras import lacks
from pdlab.core.types import UsageError
from pdlab.experiment import aliases, spellings

COMMANDS = (
    "sim", "plan", "sweep", "tune", "board", "costs", "lab", "trace", "serve", "import", "status", "drain", "switch", "calibrate",
    "bench", "compare", "validate", "tokenizer", "replay", "schema", "policies", "models", "hardware", "nics",
)  # fmt: skip
FILES = {"import": "import_commands"}  # where the command's name cannot be a file's


class Command(TyperCommand):
    """A command whose file is read, but not run, for what it says of itself; `real` is what is in it."""

    def __init__(self, name: str) -> None:
        super().__init__(name, help=_help(name))

    @property
    def real(self) -> Any:
        """Raises UsageError where what it needs is not installed."""
        try:
            module = import_module(f"{__package__}.{_file(str(self.name))}")
        except ImportError as error:
            if (error.name or "").startswith("pdlab"):
                raise
            raise lacks(f"pdlab {self.name}", error) from None
        found = getattr(module, "app", None)
        if found is None:
            found = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
            found.command(self.name)(getattr(module, str(self.name)))
        command = typer.main.get_command(found)
        command.name = self.name
        return command

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        return self.real.make_context(info_name, args, parent, **extra)


class CommandGroup(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return Command(cmd_name) if cmd_name in COMMANDS else None


def command(name: str) -> Any:
    """What is behind a name, with its parameters; for those who document or check it."""
    return Command(name).real


def _file(name: str) -> str:
    return FILES.get(name, name)


def _help(name: str) -> str:
    """What the function of that name says, or the app's `help`."""
    spec = find_spec(f"{__package__}.{_file(name)}")
    source = getattr(spec.loader, "get_source", lambda _: "")(spec.name) if spec is not None else ""
    for node in ast.parse(source or "").body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return cleandoc(ast.get_docstring(node) or "")
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "typer.Typer":
            return next((str(ast.literal_eval(word.value)) for word in node.value.keywords if word.arg == "help"), "")
    return ""


app = typer.Typer(
    cls=CommandGroup,
    help="How should prefill and decode be split over my machines, and which policy should run them?",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point. Exits with 0, with 2 where the user has made a mistake, with 1 where stdout is full, with 130 after Ctrl-C."""
    try:
        given = aliases.translated(sys.argv[1:] if arguments is None else arguments)
        spellings.check(given)
        app(args=given, prog_name="pdlab")
    except UsageError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            print(f"error: {str(error.filename)[:60]}...: the name is too long; give a shorter one", file=sys.stderr)
            sys.exit(2)
        if error.errno == errno.ENOSPC and error.filename is None:
            print(f"error: what there is to say cannot be written ({error.strerror})", file=sys.stderr)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python tries again as it ends
            sys.exit(1)
        raise


def _version(asked: bool) -> None:
    if asked:
        print(f"pdlab {__version__}")
        raise typer.Exit


@app.callback()
def _root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False) -> None:
    pass
