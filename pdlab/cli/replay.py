"""`pdlab replay`: a log's events again, by a fresh router or scheduler, or beside another policy."""

from __future__ import annotations

from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer
import yaml

from pdlab.cli.shared import err
from pdlab.core.types import UsageError
from pdlab.experiment.experiment import read_back
from pdlab.experiment.make_router import router
from pdlab.policies import load as load_policy
from pdlab.replay import scheduler_log
from pdlab.replay.log import Difference, read
from pdlab.replay.log import replay as replay_log
from pdlab.replay.what_if import beside
from pdlab.results.units import percent

DECISIONS = b'{"kv_blocks":'  # what an engine's decision log begins with


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
    with closing(entries):
        events, difference = replay_log(entries, fresh)
    _end(log, events, difference)


def _end(log: Path, events: int, difference: Difference | None) -> None:
    if difference is None:
        print(f"{events:,} events replayed, 0 differ")
        return
    print(f"{log}: line {difference.line}, {difference.now:.6f} s, {difference.event}")
    print(f"  logged    {difference.logged}\n  replayed  {difference.replayed}")
    print(f"{events - 1:,} events replayed alike; the next is answered otherwise, and what follows it in the log was not replayed")
    raise typer.Exit(1)


def _replay_beside(log: Path, policy: str) -> None:
    try:
        other = yaml.safe_load(policy)
    except yaml.YAMLError as error:
        raise UsageError(f"--policy {policy}: {' '.join(str(error).split())}") from None
    shadow, events, difference = beside(log, other)
    for departure in islice(shadow.departures, 20):
        whose = "" if departure.request_id is None else f" request {departure.request_id}"
        print(f"{departure.now:.6f} s  {departure.hook}{whose}: {departure.decided}, other: {departure.other}")
    if len(shadow.departures) > 20:
        print(f"... and {len(shadow.departures) - 20:,} more")
    for hook, asked in shadow.asked.items():
        print(f"{hook}: asked {asked:,} times, {shadow.departed[hook]:,} answers differ ({percent(shadow.departed[hook] / asked)})")
    _end(log, events, difference)


def _replay_decisions(log: Path) -> None:
    with log.open("rb") as lines:
        alike, difference = scheduler_log.replay(lines)
    print(f"{alike:,} batches decided alike{', then ' + difference if difference else ''}")
    if difference:
        raise typer.Exit(1)
