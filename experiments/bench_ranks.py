"""What ranks cost on a CPU: all-reduce by size, by gloo and by shared memory, and decode steps of two ranks with a thread each against one
with two threads; in one call, as both decode, and layer by layer, as both do where there is no compiler.

    python experiments/bench_ranks.py [MODEL] [--rounds 5]

MODEL is a name of the catalogue (random weights) or a folder. Both kinds run by turns, so that what else the machine does hits both. A
figure is the mean of the rounds' medians, with its 95 % interval (Student's t).
"""

from __future__ import annotations

import argparse
import multiprocessing
import socket
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait

import torch
from rich.console import Console
from rich.table import Table

from pdlab.real.engine.load import load_model
from pdlab.real.engine.options import EngineOptions
from pdlab.real.engine.runner import Piece
from pdlab.real.models.process_group import GroupExchange, meeting
from pdlab.real.models.ranks import Ranks
from pdlab.results.statistics import mean_interval

SIZES = [1 << 10, 4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20]  # bytes
CPU = torch.device("cpu")
PROMPT, STEPS, SUMS = 128, 8, 50
LONGEST_S = 120.0  # a kind's round; then something hangs
Times = dict[str, float]


def median_s(run: Callable[[], object], times: int) -> float:
    run()
    found = []
    for _ in range(times):
        began = time.perf_counter()
        run()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def rank(number: int, size: int, threads: int, port: int, model: str, told: Connection) -> None:
    """One rank; a message on `told` begins a round, None ends it."""
    torch.set_num_threads(threads)
    options = EngineOptions(model=model, load_format="dummy", kv_blocks=64, tp=size, threads=threads * size, max_model_len=1024)
    ranks = Ranks()
    sums: dict[str, Callable[[torch.Tensor], None]] = {}
    with torch.inference_mode():
        if size > 1:
            exchange = GroupExchange.over(meeting("127.0.0.1", port, at_rank_0=number == 0), number, size, CPU)
            ranks = Ranks(number, size, exchange)
            sums["gloo"] = exchange.sum_by_group
            if exchange.shared is not None:
                sums["shared memory"] = exchange.sum
        runner = load_model(options, CPU, ranks).runner(options)
        table = list(range(64))
        prompt = [Piece([1] * PROMPT, 0, table, True)]
        batch = [Piece([1], 60, table[4 * i : 4 * i + 4], True) for i in range(16)]
        runner.run(prompt)
        runner.settle_memory()  # as an engine does
        told.send({})
        while told.recv() is not None:
            found: Times = {}
            for bytes_ in SIZES if size > 1 else ():
                x = torch.zeros(bytes_ // 4)
                for way, sum_ in sums.items():
                    found[f"all-reduce of {bytes_ >> 10:5,} KiB, {way}"] = median_s(lambda x=x, sum_=sum_: sum_(x), SUMS)  # type: ignore[misc]
            found[f"prompt of {PROMPT} tokens"] = median_s(lambda: runner.run(prompt), 2)
            found["decode step, batch 1"] = median_s(lambda: runner.run([Piece([1], PROMPT, table, True)]), STEPS)
            fast, runner.fast = runner.fast, None
            found["decode step, batch 1, layer by layer"] = median_s(lambda: runner.run([Piece([1], PROMPT, table, True)]), STEPS)
            runner.fast = fast
            found["decode step, batch 16"] = median_s(lambda: runner.run(batch), STEPS)
            told.send(found)


class Kind:
    """`size` processes, a rank each."""

    def __init__(self, size: int, threads: int, model: str) -> None:
        spawn = multiprocessing.get_context("spawn")
        port = free_port() if size > 1 else 0
        self.title = f"tp {size}, {threads} thread{'s' * (threads > 1)} each"
        self.ends, self.processes = [], []
        for number in range(size):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=rank, args=(number, size, threads, port, model, theirs), daemon=True)
            process.start()
            theirs.close()  # else a rank that died would be waited for
            self.ends.append(ours)
            self.processes.append(process)
        self.answers()

    def answers(self) -> list[Times]:
        """Of each. Raises EOFError: a rank has died; TimeoutError: something hangs."""
        until, found = time.monotonic() + LONGEST_S, []
        for end in self.ends:
            if not wait([end], max(0.0, until - time.monotonic())):
                raise TimeoutError(f"{self.title}: no answer in {LONGEST_S:g} s")
            found.append(end.recv())
        return found

    def round(self) -> Times:
        """Of the slower rank."""
        for end in self.ends:
            end.send(True)
        answers = self.answers()
        return {name: max(each[name] for each in answers) for name in answers[0]}

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", nargs="?", default="qwen3-0.6b")
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    kinds = [Kind(2, 1, asked.model), Kind(1, 2, asked.model)]
    try:
        rounds = [[kind.round() for kind in kinds] for _ in range(asked.rounds)]
    finally:
        for kind in kinds:
            kind.close()
    table = Table("", *(kind.title for kind in kinds), "ratio", title=f"{asked.model}, ms, {asked.rounds} rounds by turns")
    for name in rounds[0][0]:
        columns = [[1e3 * each[i][name] for each in rounds] for i in range(2) if name in rounds[0][i]]
        cells = [spread(column) for column in columns]
        table.add_row(name, *cells, *([spread([a / b for a, b in zip(*columns, strict=True)])] if len(columns) == 2 else []))
    Console(width=140).print(table)


def spread(values: list[float]) -> str:
    found = mean_interval(values)
    assert found is not None
    return f"{found.mean:.3f}" + (f" ± {found.half:.3f}" if found.half is not None else "")


if __name__ == "__main__":
    main()
