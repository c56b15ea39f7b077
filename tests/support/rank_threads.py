"""The ranks of an instance as threads of one process, over gloo: an engine whose others follow in threads."""

from __future__ import annotations

import queue
import threading
from contextlib import ExitStack

import torch
from torch._C._distributed_c10d import HashStore

from pdlab.real.engine.load import Loaded, load, load_model
from pdlab.real.engine.options import EngineOptions
from pdlab.real.engine.passes import Pass
from pdlab.real.engine.runner import Runner
from pdlab.real.models.process_group import GroupExchange
from pdlab.real.models.ranks import Ranks

CPU = torch.device("cpu")


class RankThreads:
    """`loaded` is rank 0's; `runners` are those of the others, by rank from 1 on."""

    def __init__(self, options: EngineOptions, stack: ExitStack) -> None:
        store, size = HashStore(), options.tp
        inboxes: list[queue.SimpleQueue[Pass | None]] = [queue.SimpleQueue() for _ in range(size - 1)]
        loaded: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.runners: dict[int, Runner] = {}

        def meet(rank: int) -> Ranks:
            return Ranks(rank, size, GroupExchange.over(store, rank, size, CPU), options.ep)

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
            for thread in threads:
                thread.join()

        stack.callback(end)
