"""A small simulated cluster for tests: real deciders, real cost model, real network; only the sizes are small."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import simpy

from pdlab import batching
from pdlab.core.kv import PLAIN, BlockLayout, BlockPool
from pdlab.core.policy import Policy
from pdlab.core.router import Router
from pdlab.core.router_limits import Limits
from pdlab.core.scheduler import Scheduler
from pdlab.core.types import InstanceSpec, Role
from pdlab.cost.base import Cost
from pdlab.sim.kv_size import ANY_SIZE, KvSize
from pdlab.sim.link import Network
from pdlab.sim.moves import TransferMode
from pdlab.sim.topology import Endpoint
from pdlab.sim.worker import SimInstance
from pdlab.sim.world import World
from pdlab.workload.base import Workload

WINDOWS = (BlockLayout(1, ((1, 100),), 256), BlockLayout(2, ((1, 20), (3, 300)), 64), BlockLayout(0, ((1, 128),), 1 << 40))
PD = (("prefill-0", Role.PREFILL), ("prefill-1", Role.PREFILL), ("decode-0", Role.DECODE), ("decode-1", Role.DECODE))


class Linear(Cost):
    """prefill a + b tokens; decode c + d batch + e context. Seconds."""

    def __init__(self, a: float = 0.002, b: float = 2e-5, c: float = 0.006, d: float = 2e-5, e: float = 2e-8) -> None:
        self.a, self.b, self.c, self.d, self.e = a, b, c, d, e

    def prefill_s(self, chunks: Sequence[tuple[int, int]]) -> float:
        return self.a + self.b * sum(new for new, _ in chunks)

    def decode_line(self, batch: int, context_tokens: int) -> tuple[float, float, float]:
        return self.c + self.d * batch, self.e, math.inf

    def mixed_s(self, chunks: Sequence[tuple[int, int]], batch: int, context_tokens: int) -> float:
        return self.prefill_s(chunks) + self.decode_s(batch, context_tokens)


class Bent(Linear):
    """Like Linear, but the decode line bends at every 512 tokens of context, as a table's does."""

    def decode_line(self, batch: int, context_tokens: int) -> tuple[float, float, float]:
        piece = context_tokens // 512
        slope = self.e * (1 + piece % 3)
        return self.c + self.d * batch + 1e-4 * piece, slope, (piece + 1) * 512


class Joining(Linear):
    """Like Linear, but a model that drafts computes a prompt where its sequence decodes first."""

    joins = True

    def join_s(self, prompts: Sequence[tuple[int, int]]) -> float:
        return 1e-5 * sum(tokens for tokens, _ in prompts)


def workload(arrival_s: Sequence[float], prompt: Sequence[int] | int, output: Sequence[int] | int, **rest: object) -> Workload:
    n = len(arrival_s)
    prompts = np.full(n, prompt) if isinstance(prompt, int) else np.array(prompt)
    outputs = np.full(n, output) if isinstance(output, int) else np.array(output)
    return Workload("test", np.array(arrival_s, float), prompts.astype(np.int32), outputs.astype(np.int32), **rest)  # type: ignore[arg-type]


def small_world(
    work: Workload,
    *,
    policy: Policy | None = None,
    members: Sequence[tuple[str, Role]] = PD,
    kv_blocks: int = 2000,
    kv_size: KvSize = ANY_SIZE,
    layout: BlockLayout = PLAIN,
    cost: Cost | None = None,
    transfer: TransferMode | None = None,
    batch: str = "chunked",
    horizon: int = 1 << 30,
    gbytes_per_s: float = 25.0,
    latency_s: float = 1e-5,
    reserve_first: bool = False,
    max_seqs: int = 256,
    max_batch_tokens: int = 2048,
    prefix_cache: bool = True,
    limits: Limits | None = None,
    seed: int = 1,
    check: bool = True,
    **rest: object,
) -> World:
    """A world that asserts the invariants at every event."""
    env = simpy.Environment()
    mode = transfer or TransferMode()
    reserve_first = reserve_first or mode.granularity != "request"
    router = Router(
        policy or Policy(),
        seed=seed,
        limits=limits,
        reserve_first=reserve_first,
        first_token=mode.first_token,
        hash_tokens=work.hash_tokens,
    )
    network = Network(env, latency_s=latency_s)
    world = World(env, router, work, network, mode, **rest)  # type: ignore[arg-type]
    price = cost or Linear()

    def make(spec: InstanceSpec) -> SimInstance:
        pool = BlockPool(spec.kv_blocks, 16, work.hash_tokens, prefix_cache, layout)
        scheduler = Scheduler(pool, batching.load(batch), max_seqs=max_seqs, max_batch_tokens=max_batch_tokens)
        return SimInstance(env, world, spec, scheduler, price, world.gaps, horizon=horizon, kv_size=kv_size)

    for name, role in members:
        network.add(Endpoint(name=name, host=name, nic_bytes_per_s=gbytes_per_s * 1e9))
        world.add(InstanceSpec(name=name, role=role, kv_blocks=kv_blocks, prefix_cache=prefix_cache), make)
    if check:
        world.teller.on_event = lambda *_: check_invariants(world)
    return world


def check_invariants(world: World) -> None:
    """DESIGN §12: 1 blocks are conserved, 3 the ledgers are true."""
    world.router.check()
    for instance in world.instances.values():
        if instance.alive:
            instance.scheduler.check()
