"""The ranks' exchange over torch.distributed: gloo between CPUs, nccl between CUDA devices, hccl between NPUs. CPUs of one host sum and
gather by memory that they share."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store, TCPStore

from pdlab.kernels.all_reduce import SharedSum
from pdlab.real.models.shared_sum import meet

BACKENDS = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}
TIMEOUT = timedelta(minutes=30)  # of one exchange: a rank that has ended is known by its socket, long before


def meeting(host: str, port: int, *, at_rank_0: bool = False) -> TCPStore:
    """Where the ranks of an instance find each other; rank 0 makes it, on a free port where `port` is 0."""
    return TCPStore(host, port, is_master=at_rank_0, wait_for_workers=False)


class GroupExchange:
    """An Exchange over a process group of `size`, of which this is `rank`. `shared`: the sum by shared memory, where all have it."""

    def __init__(self, group: Any, rank: int, size: int) -> None:
        self.group, self.rank, self.size = group, rank, size
        self.shared: SharedSum | None = None
        self.adding, self.largest, self.to_first = dist.AllreduceOptions(), dist.AllreduceOptions(), dist.GatherOptions()
        self.largest.reduceOp = dist.ReduceOp(dist.ReduceOp.MAX)
        self.to_first.rootRank = 0

    @classmethod
    def over(cls, store: Store, rank: int, size: int, device: torch.device, address: str = "127.0.0.1") -> GroupExchange:
        """Meet the others at `store`; CPUs reach this rank by `address`. A CPU's group is this object's own; an accelerator's is the
        process's."""
        if device.type == "cpu":
            options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
            options._devices = [dist.ProcessGroupGloo.create_device(hostname=address, lazy_init=False)]
            options._timeout = TIMEOUT
            found = cls(dist.ProcessGroupGloo(store, rank, size, options), rank, size)
            found._share(store)
            return found
        getattr(torch, device.type).set_device(device)
        dist.init_process_group(BACKENDS[device.type], store=store, rank=rank, world_size=size, timeout=TIMEOUT)
        world = dist.group.WORLD
        assert world is not None
        return cls(world, rank, size)

    def _share(self, store: Store) -> None:
        shared = meet(store, self.rank, self.size)
        able = torch.tensor([float(shared is not None)])
        self.sum(able)
        if able.item() == self.size:
            self.shared = shared

    def sum(self, x: Tensor) -> None:
        if self.shared is not None and self.shared.takes(x):
            self.shared(x)
        else:
            self.sum_by_group(x)

    def sum_by_group(self, x: Tensor) -> None:
        """The same, by the process group whatever else there is."""
        self.group.allreduce([x], self.adding).wait()

    def most(self, x: Tensor) -> None:
        self.group.allreduce([x], self.largest).wait()

    def gather(self, x: Tensor) -> Tensor:
        if self.shared is not None and self.shared.takes(x):
            gathered: Tensor = self.shared.gather(x)
            return gathered
        parts = x.new_empty((self.size if self.rank == 0 else 0, *x.shape))
        self.group.gather([list(parts)] if self.rank == 0 else [], [x], self.to_first).wait()
        return parts
