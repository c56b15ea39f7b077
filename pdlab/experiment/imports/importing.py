"""From launch commands to all that `pdlab import` has to say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from pdlab.experiment.imports.checks import check
from pdlab.experiment.imports.experiment_file import Instead, as_yaml, mapping_of
from pdlab.experiment.imports.launches import read
from pdlab.experiment.imports.programs import Dropped
from pdlab.experiment.imports.serve_commands import ServeCommand, commands
from pdlab.experiment.imports.shell import Script, ScriptMistake

Told = TypeVar("Told", Dropped, ScriptMistake)


@dataclass(frozen=True, slots=True)
class Imported:
    """`mapping` is the experiment, `yaml` its file. Lines are of the script."""

    mapping: dict[str, Any]
    yaml: str
    commands: list[ServeCommand]
    dropped: list[Dropped]
    mistakes: list[ScriptMistake]
    notes: list[ScriptMistake]


def imported(script: Script, source: str, file: str, instead: Instead) -> Imported:
    """`source` names the script, `file` the experiment file in the commands. Raises UsageError where there is nothing to import, or the
    whole makes no sense."""
    reading = read(script)
    reading.mistakes.extend(check(reading))
    mapping, rows = mapping_of(reading, instead)
    serve = commands(reading, rows, file, instead)
    systems = list(dict.fromkeys(one.program.system for one in reading.launches if one.program.kind != "client"))
    text = as_yaml(mapping, source, systems)
    return Imported(mapping, text, serve, _by_line(reading.dropped), _by_line(reading.mistakes), _by_line(reading.notes))


def _by_line(found: list[Told]) -> list[Told]:
    return sorted(found, key=lambda one: one.line)
