"""`pdlab schema`: what an experiment file may say."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from pdlab.experiment.schema import schema as whole
from pdlab.experiment.table import table


def schema(
    as_table: Annotated[bool, typer.Option("--table", help="In its place, in Markdown: which world uses which key.")] = False,
) -> None:
    """The experiment file's JSON schema, for editors: `pdlab schema > experiment.schema.json`."""
    if as_table:
        print(table())
        return

    print(json.dumps(whole(), indent=2))
