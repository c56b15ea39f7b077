"""The ranks of an instance as threads of one process: an engine whose others follow in threads. They add up by memory, or over gloo."""

from __future__ import annotations

import mmap
import queue
import threading
from contextlib import ExitStack

import torch
from torch._C._distributed_c10d import HashStore

from pdlab.kernels.all_reduce import SharedSum, available
from pdlab.real.engine.load import Loaded, load, load_model
from pdlab.real.engine.options import EngineOptions
from pdlab.real.engine.passes import Pass
from pdlab.real.engine.runner import Runner
from pdlab.real.models.process_group import GroupExchange
from pdlab.real.models.ranks import Ranks

CPU = torch.device("cpu")


class RankThreads:
    """`loaded` is rank 0's; `runners` are those of the others, by rank from 1 on. `shared`: they add up by memory, where there is a
    compiler."""

    def __init__(self, options: EngineOptions, stack: ExitStack, *, shared: bool = True) -> None:
        store, size = HashStore(), options.tp
        memory = mmap.mmap(-1, SharedSum.bytes(size)) if shared and available() else None
        over = threading.Event()
        inboxes: list[queue.SimpleQueue[Pass | None]] = [queue.SimpleQueue() for _ in range(size - 1)]
        loaded: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.runners: dict[int, Runner] = {}

        def missing(rank: int) -> None:
            if over.is_set():
                raise RuntimeError(f"rank {rank} has ended")

        def meet(rank: int) -> Ranks:
            exchange = GroupExchange.over(store, rank, size, CPU)
            if memory is not None:
                exchange.shared = SharedSum(memory, rank, size, missing)
            return Ranks(rank, size, exchange, options.ep)

        def follow(rank: int) -> None:
            runner = self.runners[rank] = load_model(options, CPU, meet(rank)).runner(options)
            loaded.put(rank)
            while (step := inboxes[rank - 1].get()) is not None:
                runner.follow(step)

        def tell(step: Pass | None) -> None:
            for inbox in inboxes:
                inbox.put(step)

        threads = [threading.Thread(target=follow, args=(rank,), daemon=True) for rank in range(1, size)]
        for thread in threads:
            thread.start()
        self.loaded: Loaded = load(options, None, meet(0), tell)

        for _ in range(size - 1):
            loaded.get(timeout=60)

        def end() -> None:
            tell(None)
            over.set()
            for thread in threads:
                thread.join()

        stack.callback(end)
