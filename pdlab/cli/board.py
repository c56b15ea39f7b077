"""`pdlab board`: a table of measured servers, each row simulated as it was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from pdlab.cli.pools import pool_of, progress
from pdlab.cli.shared import Jobs, Traceback, out, traced
from pdlab.core.types import UsageError
from pdlab.cost.measurements import of_models, read_rows
from pdlab.search.board.page import board_table, write_board
from pdlab.search.board.run import ScoredRow, score

TRAIN = Path("../shared/data/silicon/train.csv")


def board(
    rows: Annotated[Path, typer.Option("--rows", metavar="CSV", help="The measured rows.")] = TRAIN,
    models: Annotated[
        list[str] | None, typer.Option("--model", metavar="NAME", help="Only rows of this model.", show_default=False)
    ] = None,
    jobs: Jobs = None,
    out_dir: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the page and the rows go.")] = Path("out/board"),
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    traceback: Traceback = False,
) -> None:
    """Simulate every row of a table of measured servers, and say how far off the simulator is: one table, one page."""
    with traced(traceback):
        pool = pool_of("board", jobs, None)
        measured, left_out = read_rows(rows)
        measured = of_models(measured, models or [])
        if not measured:
            raise UsageError(f"measurements {rows}: no row can be simulated; {left_out[0][1] if left_out else 'the table is empty'}")
        with closing(pool), progress(rows.stem, len(measured), "rows", quiet) as ended:
            scored = list(_counted(score(measured, pool), ended))
        page, table = write_board(out_dir, rows.stem, scored, [] if models else left_out)
        if not quiet:
            out.print(board_table(scored, [] if models else left_out))
            for line in (f"picture  {page}", f"table    {table}: {len(scored):,} rows"):
                out.print(line, highlight=False, soft_wrap=True, markup=False)


def _counted(scored: Iterator[ScoredRow], ended: Callable[[], None]) -> Iterator[ScoredRow]:
    for one in scored:
        ended()
        yield one
