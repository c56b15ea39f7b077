"""The router's world over real instances: real engines in processes of their own, real sockets, real KV. Whatever way a request takes, its
client gets what one engine alone makes of it; the log of the run replays; and nothing stays behind."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pdlab.core.policy import Policy
from pdlab.core.prefix import chain
from pdlab.core.types import Role
from pdlab.core.view import Cluster, Instance
from pdlab.experiment.experiment import Experiment
from pdlab.experiment.make_router import router
from pdlab.real.engine.messages import Sampling, Tokens
from pdlab.real.engine.options import EngineOptions, SpeculationOptions
from pdlab.real.instance.engine_client import EngineClient
from pdlab.real.router.http_remote import HttpRemote
from pdlab.real.router.world import LiveWorld
from pdlab.replay.log import EventLog, head_of, read, replay
from tests.real.transfer.ways import NIXL
from tests.support import echo_engine, served, tiny_models
from tests.support.local_instances import TOKEN, instance
from tests.support.local_instances import Instance as Server

BLOCK = 4
GREEDY = Sampling(max_tokens=12, temperature=0.0, ignore_eos=True)


def experiment(policy: object = "least_loaded", **transfer: object) -> Experiment:
    return Experiment.parse(
        {
            "model": "smollm2-135m",
            "seed": 5,
            "workload": {"source": "azure-conv-2023", "requests": 1, "rate": 1.0},
            "cluster": {"instances": [{"role": "prefill", "count": 1, "hardware": "l4"}, {"role": "decode", "count": 1, "hardware": "l4"}]},
            "policy": policy,
            "transfer": transfer,
            "limits": {"lease_s": 600.0},  # no reports come here
        }
    )


@dataclass
class Client:
    """Checks on the way that each candidate's tokens come once each, in order."""

    candidates: list[list[int]]
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    finish: dict[int, str] = field(default_factory=dict)
    error: str = ""

    def take(self, tokens: Tokens) -> None:
        known = self.candidates[tokens.candidate]
        assert tokens.start == len(known)
        assert tokens.candidate not in self.finish
        known += tokens.tokens
        if tokens.finish is not None:
            self.finish[tokens.candidate] = tokens.finish
            self.error = tokens.error
            if len(self.finish) == len(self.candidates):
                self.ended.set()


@asynccontextmanager
async def engines(folder: Path, names: str, transport: str, **options: object) -> AsyncIterator[dict[str, Any]]:
    async with AsyncExitStack() as stack:
        given: dict[str, Any] = {"block_tokens": BLOCK, "kv_blocks": 1200, "max_seqs": 32, "max_batch_tokens": 64, "threads": 1, **options}
        made = await asyncio.gather(
            *(
                EngineClient.start(EngineOptions(model=str(folder), kv_name=name, kv_transport=transport, kv_checksums=True, **given))
                for name in names.split()
            )
        )
        for engine in made:
            stack.push_async_callback(engine.close)
        yield dict(zip(names.split(), made, strict=True))


@asynccontextmanager
async def world(
    servers: dict[str, Server], roles: dict[str, Role], asked: Experiment, policy: Policy | None = None, log: EventLog | None = None
) -> AsyncIterator[LiveWorld]:
    loop = asyncio.get_running_loop()
    started_s = loop.time()
    made = LiveWorld(
        router(asked, hash_tokens=BLOCK, policy=policy),
        lambda spec: HttpRemote(spec, token=TOKEN),
        transfer=asked.transfer,
        now=lambda: loop.time() - started_s,
        log=log,
        seed=asked.seed,
    )
    made.open()
    try:
        for name, server in servers.items():
            made.instances.join(msgspec.structs.replace(server.member.spec, role=roles[name], incarnation=1))
        yield made
        made.check()
        assert not made.requests.by_id
        await at_rest(servers)
    finally:
        await made.close()


async def at_rest(servers: dict[str, Server]) -> None:
    async with asyncio.timeout(200):
        for server in servers.values():
            while (load := server.engine.load).leases or load.report.used_blocks or server.service.in_flight:
                await asyncio.sleep(0.02)
            assert load.leaked_blocks == 0


async def ask(world: LiveWorld, prompts: list[list[int]], sampling: Sampling) -> list[list[list[int]]]:
    clients = [Client([[] for _ in range(sampling.best_of)]) for _ in prompts]
    for client, prompt in zip(clients, prompts, strict=True):
        world.submit(prompt, sampling, client.take, hashes=chain(prompt, BLOCK))
        await asyncio.sleep(0.002)
    async with asyncio.timeout(600):
        for client in clients:
            await client.ended.wait()
    assert {finish for client in clients for finish in client.finish.values()} == {"length"}, [c.error for c in clients if c.error]
    return [client.candidates for client in clients]


def some_prompts(count: int, seed: int = 1) -> list[list[int]]:
    rng = random.Random(seed)
    shared = [rng.randrange(256) for _ in range(21)]
    return [
        shared[: rng.choice((0, 8, 21))] + [rng.randrange(256) for _ in range(rng.choice((1, 3, 4, 30, 90, 200)))] for _ in range(count)
    ]


def play(folder: Path, transport: str, scenario: Callable[[dict[str, Server]], Any], names: str = "p d", **options: object) -> None:
    async def run() -> None:
        async with AsyncExitStack() as stack:
            started = await stack.enter_async_context(engines(folder, names, transport, **options))
            servers = {name: await stack.enter_async_context(instance(folder, name, engine=one)) for name, one in started.items()}
            await scenario(servers)

    asyncio.run(run())


WAYS = {
    "pull": {"mode": "pull"},
    "pull, D samples the first token": {"mode": "pull", "first_token": "decode"},
    "reserve, then pull": {"mode": "pull", "reserve": "before_prefill"},
    "push by request": {"mode": "push", "granularity": "request", "reserve": "before_prefill"},
    "push by chunk": {"mode": "push", "granularity": "chunk", "reserve": "before_prefill"},
    "push by layer": {"mode": "push", "granularity": "layer", "reserve": "before_prefill"},
    "push by layer, D samples": {"mode": "push", "granularity": "layer", "reserve": "before_prefill", "first_token": "decode"},
}


@pytest.mark.parametrize("transport", ["shm", "tcp", NIXL])
def test_fifty_prompts_by_every_way_give_what_one_engine_alone_gives(
    transport: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UCX_NET_DEVICES", "lo")  # else NIXL listens on every interface
    folder = served.make(tmp_path, num_hidden_layers=4)
    prompts = some_prompts(50)

    async def scenario(servers: dict[str, Server]) -> None:
        async with world({"d": servers["d"]}, {"d": Role.MIXED}, experiment()) as alone:
            expected = await ask(alone, prompts, GREEDY)
            several = await ask(alone, prompts[:6], msgspec.structs.replace(GREEDY, temperature=1.0, seed=3, best_of=3))
        for way, transfer in WAYS.items():
            async with world(servers, {"p": Role.PREFILL, "d": Role.DECODE}, experiment(**transfer)) as cluster:
                assert await ask(cluster, prompts, GREEDY) == expected, way
                moved = [cluster.timeline(i)["transfer_bytes"] for i in range(50)]
                assert all(size or size == 0 for size in moved)
                assert sum(moved) > 0, way
            if "samples" not in way:
                async with world(servers, {"p": Role.PREFILL, "d": Role.DECODE}, experiment(**transfer)) as cluster:
                    best = await ask(cluster, prompts[:6], msgspec.structs.replace(GREEDY, temperature=1.0, seed=3, best_of=3))
                    assert [sorted(map(len, c)) for c in best] == [sorted(map(len, c)) for c in several]
                    same = sum(a == b for c, e in zip(best, several, strict=True) for a, b in zip(c, e, strict=True))
                    assert same >= 15, f"{way}: {same} of 18 drawn candidates alike"  # a draw may fall on a rounding

    play(folder, transport, scenario)


class Shuttle(Policy):
    """Moves whatever decodes to the other decode instance, again and again."""

    tick_s = 0.02

    def migrate(self, cluster: Cluster) -> list[tuple[int, Instance]]:
        return [(id, other) for x in cluster.decode for id in x.decoding for other in cluster.decode if other is not x]


@pytest.mark.parametrize("drafts", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_migrations_in_the_middle_change_nothing(drafts: bool, tmp_path: Path) -> None:
    """Nor with drafts: the draft model's KV is made anew wherever a sequence goes."""
    folder = served.make(tmp_path, **tiny_models.SLOW)
    prompts = some_prompts(8)
    speculation = SpeculationOptions(method="draft_model", tokens=2, model=str(folder)) if drafts else None
    long = msgspec.structs.replace(GREEDY, max_tokens=150)

    async def scenario(servers: dict[str, Server]) -> None:
        async with world({"d0": servers["d0"]}, {"d0": Role.MIXED}, experiment()) as alone:
            expected = await ask(alone, prompts, long)
        roles = {"p": Role.PREFILL, "d0": Role.DECODE, "d1": Role.DECODE}
        async with world(servers, roles, experiment(mode="pull"), policy=Shuttle()) as cluster:
            assert await ask(cluster, prompts, long) == expected
            assert sum(int(cluster.timeline(i)["migrations"]) for i in range(8)) >= 4  # type: ignore[call-overload]

    play(folder, "auto", scenario, names="p d0 d1", speculation=speculation)


@pytest.mark.parametrize(
    ("family", "drafts"),
    [
        ("gpt-oss", ""),
        pytest.param("ernie4_5-moe", "", marks=pytest.mark.slow),
        pytest.param("llama4", "", marks=pytest.mark.slow),
        ("llama", "qwen2"),
    ],
)
def test_prefill_there_and_decode_here_of_other_models(family: str, drafts: str, tmp_path: Path) -> None:
    """What transformers makes of them, whether one engine has all of it or two; with drafts of another model, too."""
    model, small = tmp_path / "model", tmp_path / "small"
    reference = tiny_models.make(family, model)
    echo_engine.byte_tokenizer(model)
    speculation = None
    if drafts:
        tiny_models.make(drafts, small)
        speculation = SpeculationOptions(method="draft_model", tokens=3, model=str(small))
    prompts = some_prompts(8)
    expected = [[tiny_models.greedy(reference, prompt, GREEDY.max_tokens)] for prompt in prompts]

    async def scenario(servers: dict[str, Server]) -> None:
        async with world({"d": servers["d"]}, {"d": Role.MIXED}, experiment()) as alone:
            assert await ask(alone, prompts, GREEDY) == expected
        for way in ("pull", "push by layer, D samples"):
            async with world(servers, {"p": Role.PREFILL, "d": Role.DECODE}, experiment(**WAYS[way])) as cluster:
                assert await ask(cluster, prompts, GREEDY) == expected, way
                assert sum(int(cluster.timeline(i)["transfer_bytes"]) for i in range(8)) > 0  # type: ignore[call-overload]
        assert (servers["d"].engine.load.drafts > 0) == bool(drafts)
        assert servers["p"].engine.load.drafts == 0, "who prefills drafts nothing"

    play(model, "shm", scenario, speculation=speculation)


@pytest.mark.parametrize("policy", ["llumnix", {"dispatch": "prefix_aware", "handoff": "least_kv"}])
def test_the_log_of_two_hundred_requests_replays_to_identical_decisions(policy: object, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    folder = served.make(tmp_path / "model")
    asked = experiment(policy, mode="pull")
    log = tmp_path / "events.jsonl"
    prompts = some_prompts(200, seed=2)

    async def scenario(servers: dict[str, Server]) -> None:
        roles = {"p0": Role.PREFILL, "p1": Role.PREFILL, "d0": Role.DECODE, "d1": Role.DECODE}
        with EventLog(log, head_of(asked, router(asked, hash_tokens=BLOCK).policy, BLOCK)) as events:
            async with world(servers, roles, asked, log=events) as cluster:
                reporting = asyncio.create_task(reports(cluster, servers))
                await ask(cluster, prompts, GREEDY)
                reporting.cancel()
                served_by = {str(cluster.timeline(i)["prefill_instance"]) for i in range(200)}
                assert served_by == {"p0", "p1"}

    play(folder, "auto", scenario, names="p0 p1 d0 d1")
    head, entries = read(log)
    count, difference = replay(entries, router(Experiment.parse(head.experiment), hash_tokens=head.hash_tokens))
    assert count > 800
    assert difference is None


async def reports(world: LiveWorld, servers: dict[str, Server]) -> None:
    while True:
        for name, server in servers.items():
            world.instances.report(server.engine.report(name, 1))
        await asyncio.sleep(0.05)
