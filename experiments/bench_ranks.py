"""What ranks cost on a CPU: gloo's all-reduce by size, and a decode step of two ranks with a thread each against one with two threads.

    python experiments/bench_ranks.py [MODEL]

MODEL is a name of the catalogue (random weights) or a folder. The least of many runs counts: others use the machine, too.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch

from pdlab.real.engine.load import load_model
from pdlab.real.engine.options import EngineOptions
from pdlab.real.engine.runner import Piece
from pdlab.real.models.process_group import GroupExchange, meeting
from pdlab.real.models.ranks import Ranks

SIZES = [1 << 10, 4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20]  # bytes
CPU = torch.device("cpu")
PROMPT, STEPS = 256, 15


def least_s(run: Callable[[], object], times: int) -> float:
    best = float("inf")
    for _ in range(times):
        began = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - began)
    return best


def rank(number: int, size: int, threads: int, port: int, model: str, told: Connection) -> None:
    torch.set_num_threads(threads)
    options = EngineOptions(model=model, load_format="dummy", kv_blocks=64, tp=size, threads=threads * size, max_model_len=1024)
    ranks = Ranks()
    found: dict[str, float] = {}
    with torch.inference_mode():
        if size > 1:
            ranks = Ranks(number, size, GroupExchange.over(meeting("127.0.0.1", port, at_rank_0=number == 0), number, size, CPU))
            for bytes_ in SIZES:
                x = torch.zeros(bytes_ // 4)
                found[f"all-reduce of {bytes_ >> 10:5,} KiB"] = least_s(lambda x=x: ranks.sum(x), 300)  # type: ignore[misc]
        runner = load_model(options, CPU, ranks).runner(options)
        table = list(range(64))
        prompt = [Piece([1] * PROMPT, 0, table, True)]
        found[f"prompt of {PROMPT} tokens"] = least_s(lambda: runner.run(prompt), 3)
        found["decode step, batch 1"] = least_s(lambda: runner.run([Piece([1], PROMPT, table, True)]), STEPS)
        batch = [Piece([1], 60, table[4 * i : 4 * i + 4], True) for i in range(16)]
        found["decode step, batch 16"] = least_s(lambda: runner.run(batch), STEPS)
    told.send(found)


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else "qwen3-0.6b"
    spawn = multiprocessing.get_context("spawn")
    for size, threads in ((2, 1), (1, 2)):
        ours, theirs = spawn.Pipe()
        port = 29600 + size
        processes = [spawn.Process(target=rank, args=(number, size, threads, port, model, theirs)) for number in range(size)]
        for process in processes:
            process.start()
        found = [ours.recv() for _ in processes]
        for process in processes:
            process.join()
        print(f"{model}: tp {size}, {threads} threads each")
        for name in found[0]:
            print(f"  {name:28} {1e3 * max(each[name] for each in found):9.3f} ms")


if __name__ == "__main__":
    main()
