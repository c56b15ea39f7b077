"""The board in the terminal, as a page, and as a table of rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group as Stack
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from pdlab.report.page import definition_list, escaped, page, table
from pdlab.results.units import MISSING, percent
from pdlab.search.board.run import ScoredRow
from pdlab.search.board.score import (
    MEASURES,
    WITH_INTERVALS,
    Errors,
    RowGroup,
    band,
    by_band,
    by_server,
    coverage,
    groups,
    interval_holds,
    order,
)

if TYPE_CHECKING:
    import pandas as pd

PAGE, ROWS = "board.html", "board.parquet"
WORDS = {"tpot": "TPOT", "ttft": "TTFT", "throughput": "tokens/s/GPU"}
BANDS = ("requests", "figure", "rows", "failed", "MAPE", "median", "bias", "Spearman")
SERVERS = ("model", "accelerator", "engine", "requests", "rows", "failed")
TOLD = {
    "TPOT\nMAPE": ("tpot", "mape"),
    "TPOT\nbias": ("tpot", "bias"),
    "TTFT\nmed": ("ttft", "median"),
    "TTFT\nbias": ("ttft", "bias"),
    "tok/s\nMAPE": ("throughput", "mape"),
}
READING = {
    "requests": "how many were always in flight; P/D: prefill and decode apart, whatever their number",
    "MAPE, median, bias": "mean and median of the absolute errors, and the mean error; an error is simulated / measured - 1",
    "Spearman": "rank correlation of simulated with measured figures, over the group's rows",
    "tokens/s/GPU": "output tokens a second and accelerator, by Little's law, of measured and simulated figures alike",
    "order": "of two configurations that differ in nothing but parallelism, by 5 % or more: which is better?",
    "95 % intervals": "what a cost says of its own error; they should hold the measured figures of 95 % of rows",
    "failed": "rows that could not be simulated",
}


def board_table(scored: Sequence[ScoredRow], left_out: Sequence[tuple[str, str]]) -> RenderableType:
    """In a terminal's width; the page has all."""
    parts: list[RenderableType] = [_bands(groups(scored, by_band)), Text(""), _servers(groups(scored, by_server)), Text("")]
    parts += [Text(line) for line in (*order_lines(scored), *coverage_lines(scored), *failure_lines(scored, left_out))]
    return Stack(*parts)


def _bands(found: Sequence[RowGroup]) -> Table:
    """Errors in per cent: mean absolute, median absolute, mean; and Spearman's rank correlation."""
    made = _table("requests", "rows", *(f"{WORDS[measure]}\nMAPE med bias rank" for measure in MEASURES))
    for group in found:
        made.add_row(*group.key, f"{group.rows:,}", *(_short(group.errors.get(measure)) for measure in MEASURES))
    return made


def _servers(found: Sequence[RowGroup]) -> Table:
    made = _table("server, requests", "rows", *TOLD)
    for group in found:
        *server, requests = group.key
        failed = f" ({group.failures:,} failed)" if group.failures else ""
        told = ((group.errors.get(measure), what) for measure, what in TOLD.values())
        figures = (MISSING if of is None else f"{100 * getattr(of, what):.0f}" for of, what in told)
        made.add_row(f"{' '.join(server)}, {requests}{failed}", f"{group.rows:,}", *figures)
    return made


def _table(first: str, *others: str) -> Table:
    made = Table(box=None, padding=(0, 1), pad_edge=False)
    made.add_column(first, header_style="bold", overflow="fold")
    for name in others:
        made.add_column(name, justify="right", header_style="bold", no_wrap=True)
    return made


def _short(found: Errors | None) -> str:
    if found is None:
        return MISSING
    rank = f"{MISSING:>4}" if found.spearman is None else f"{found.spearman:4.2f}"
    return f"{100 * found.mape:4.0f} {100 * found.median:3.0f} {100 * found.bias:4.0f} {rank}"


def band_cells(group: RowGroup) -> list[list[str]]:
    """A line for each figure."""
    rows = f"{group.rows:,}", f"{group.failures:,}" if group.failures else ""
    return [[*group.key, WORDS[measure], *rows, *_errors(group.errors.get(measure))] for measure in MEASURES]


def _errors(found: Errors | None) -> list[str]:
    if found is None:
        return [MISSING] * 4
    return [percent(found.mape), percent(found.median), percent(found.bias), MISSING if found.spearman is None else f"{found.spearman:.2f}"]


def server_cells(group: RowGroup) -> list[str]:
    told = ((group.errors.get(measure), what) for measure, what in TOLD.values())
    figures = (MISSING if of is None else percent(getattr(of, what)) for of, what in told)
    return [*group.key, f"{group.rows:,}", f"{group.failures:,}" if group.failures else "", *figures]


def order_lines(scored: Sequence[ScoredRow]) -> list[str]:
    """How often the better of two configurations is told, aggregated and P/D."""
    lines = []
    for title, disaggregated in (("aggregated", False), ("P/D", True)):
        own = [one for one in scored if one.row.disaggregated is disaggregated]
        for measure in ("throughput", "ttft"):
            found = order(own, measure)
            if found.share is not None:
                lines.append(f"order, {title}, by {WORDS[measure]}: {found.right:g} of {found.pairs} pairs ({percent(found.share)})")
    return lines


def coverage_lines(scored: Sequence[ScoredRow]) -> list[str]:
    """How often costs' 95 % intervals hold what was measured, by band."""
    lines = []
    for measure in WITH_INTERVALS:
        shares = []
        for name in sorted({band(one) for one in scored}):
            found = coverage([one for one in scored if band(one) == name], measure)
            if found.share is not None:
                shares.append(f"{name} {percent(found.share)} of {found.rows:,}")
        if shares:
            lines.append(f"95 % intervals of {WORDS[measure]} hold the measured figure: {', '.join(shares)} rows")
    return lines


def failure_lines(scored: Sequence[ScoredRow], left_out: Sequence[tuple[str, str]]) -> list[str]:
    failed = Counter(one.failure for one in scored if one.failure)
    lines = [f"failed: {times:,} x {reason}" for reason, times in failed.most_common(12)]
    reasons = Counter(reason for _, reason in left_out)
    return [*lines, *(f"left out: {times:,} x {reason}" for reason, times in reasons.most_common(12))]


def board_page(name: str, scored: Sequence[ScoredRow], left_out: Sequence[tuple[str, str]]) -> str:
    lines = (*order_lines(scored), *coverage_lines(scored), *failure_lines(scored, left_out))
    body = [
        f"<h1>Board: {escaped(name)}</h1>",
        f"<p class=soft>{len(scored):,} measured {'row' if len(scored) == 1 else 'rows'}, each simulated as it was measured.</p>",
        "<h2>By concurrency</h2>",
        table(BANDS, [line for group in groups(scored, by_band) for line in band_cells(group)], text=2),
        "<h2>By model, accelerator and engine</h2>",
        table(
            (*SERVERS, *(name.replace("\n", " ") for name in TOLD)), [server_cells(group) for group in groups(scored, by_server)], text=4
        ),
        *(f"<p>{escaped(line)}</p>" for line in lines),
        "<h2>What the words mean</h2>",
        definition_list(READING.items()),
    ]
    return page(f"Board: {name}", body)


def board_frame(scored: Sequence[ScoredRow]) -> pd.DataFrame:
    """One row a measured row: what it was, measured and simulated figures, their errors, and why there is none."""
    import pandas as pd

    return pd.DataFrame([_line(one) for one in sorted(scored, key=lambda one: one.row.id)])


def _line(one: ScoredRow) -> dict[str, object]:
    row = one.row
    return {
        "id": row.id,
        "model": row.model_name,
        "hardware": row.hardware_name,
        "engine": row.engine,
        "version": row.version,
        "weight_dtype": row.weight_dtype or "",
        "kv_dtype": row.kv_dtype,
        "setup": row.setup,
        "band": band(one),
        "disaggregated": row.disaggregated,
        "gpus": row.gpus,
        "prompt_tokens": row.prompt_tokens,
        "output_tokens": row.output_tokens,
        "concurrency": row.concurrency,
        "measured_ttft_s": row.ttft_s,
        "measured_tpot_s": row.tpot_s,
        "measured_tokens_per_s_per_gpu": row.tokens_per_s_per_gpu,
        "ttft_s": one.ttft_s,
        "tpot_s": one.tpot_s,
        "tokens_per_s_per_gpu": one.tokens_per_s_per_gpu,
        **{f"{measure}_error": error for measure, error in one.errors.items()},
        **{f"{measure}_in_interval": interval_holds(one, measure) for measure in WITH_INTERVALS},
        "failure": one.failure,
        "cpu_s": one.cpu_s,
    }


def write_board(folder: Path, name: str, scored: Sequence[ScoredRow], left_out: Sequence[tuple[str, str]]) -> tuple[Path, Path]:
    """The page and the rows, in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PAGE).write_text(board_page(name, scored, left_out), encoding="utf-8")
    board_frame(scored).to_parquet(folder / ROWS, index=False)
    return folder / PAGE, folder / ROWS
