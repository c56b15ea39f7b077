"""Structured outputs across real engines behind the router: what the client gets is what one engine alone makes of it, by whatever way it
comes, while it is moved to and fro, and after the death of whoever made it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import msgspec
import pytest

from pdlab.core.types import Role
from pdlab.real.engine.messages import Sampling, StructuredOutputs
from pdlab.real.router.world import LiveWorld
from tests.real.live.test_same_tokens import WAYS, Client, Shuttle, experiment, play, some_prompts, world
from tests.support import served, tiny_models
from tests.support.local_instances import Instance as Server

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 20, "maxLength": 30, "pattern": "^[a-zé ]*$"},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 6, "maxItems": 9},
    },
    "required": ["name", "tags"],
    "additionalProperties": False,
}
PERSON = StructuredOutputs(json=json.dumps(SCHEMA), disable_any_whitespace=True)
GREEDY = Sampling(max_tokens=280, temperature=0.0, structured=PERSON)
DRAWN = msgspec.structs.replace(GREEDY, temperature=1.0, seed=3)
PROMPTS = some_prompts(3)
SLOW = {**tiny_models.SLOW, "intermediate_size": 1024}


async def outputs(cluster: LiveWorld, sampling: Sampling, ended: list[Client] | None = None) -> list[list[list[int]]]:
    clients = [Client([[] for _ in range(sampling.best_of)]) for _ in PROMPTS]
    for client, prompt in zip(clients, PROMPTS, strict=True):
        cluster.submit(prompt, sampling, client.take)
    if ended is not None:
        ended += clients
    async with asyncio.timeout(300):
        for client in clients:
            await client.ended.wait()
    assert {finish for client in clients for finish in client.finish.values()} == {"stop"}, [c.error for c in clients]
    return [client.candidates for client in clients]


def are_right(found: list[list[list[int]]]) -> None:
    for candidate in (one for candidates in found for one in candidates):
        assert candidate[-1] == served.EOS
        person = json.loads(bytes(candidate[:-1]))
        assert 20 <= len(person["name"]) <= 30
        assert 6 <= len(person["tags"]) <= 9
        assert set(person["tags"]) <= {"red", "green", "blue"}


async def alone(server: Server, sampling: Sampling) -> list[list[list[int]]]:
    async with world({"alone": server}, {"alone": Role.MIXED}, experiment()) as one:
        found = await outputs(one, sampling)
    are_right(found)
    return found


@pytest.mark.parametrize("way", ["pull", "pull, D samples the first token", "push by layer"])
def test_it_goes_on_after_a_hand_off(way: str, tmp_path: Path) -> None:
    several = msgspec.structs.replace(DRAWN, best_of=2)

    async def scenario(servers: dict[str, Server]) -> None:
        expected = await alone(servers["d"], GREEDY)
        roles = {"p": Role.PREFILL, "d": Role.DECODE}
        async with world(servers, roles, experiment(**WAYS[way])) as cluster:
            assert await outputs(cluster, GREEDY) == expected
            are_right(await outputs(cluster, DRAWN))
            are_right(await outputs(cluster, several))
            assert sum(float(str(cluster.timeline(i)["transfer_bytes"])) for i in range(3)) > 0

    play(served.make(tmp_path), "shm", scenario, eos_ids=(served.EOS,))


def test_it_goes_on_after_migrations(tmp_path: Path) -> None:
    async def scenario(servers: dict[str, Server]) -> None:
        expected = await alone(servers["d0"], GREEDY)
        roles = {"p": Role.PREFILL, "d0": Role.DECODE, "d1": Role.DECODE}
        async with world(servers, roles, experiment(mode="pull"), policy=Shuttle()) as cluster:
            sent = migrations = 0
            while migrations < 3:  # on a fast machine an answer may end before it has moved
                assert sent < 30, f"{migrations} migrations of {sent} requests"
                assert await outputs(cluster, GREEDY) == expected
                sent += len(PROMPTS)
                migrations = sum(int(str(cluster.timeline(i)["migrations"])) for i in range(sent))

    play(served.make(tmp_path, **SLOW), "shm", scenario, names="p d0 d1", eos_ids=(served.EOS,))


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_it_goes_on_after_a_death(sampling: Sampling, tmp_path: Path) -> None:
    """Its tokens so far are given to whoever goes on, which follows the grammar through them."""

    async def scenario(servers: dict[str, Server]) -> None:
        expected = await alone(servers["d1"], sampling)
        roles = {"p": Role.PREFILL, "d0": Role.DECODE}
        taking_part = {name: servers[name] for name in roles}
        async with world(taking_part, roles, experiment(mode="pull")) as cluster:
            clients: list[Client] = []
            asking = asyncio.create_task(outputs(cluster, sampling, clients))
            while not clients or min(len(c.candidates[0]) for c in clients) < 10:
                await asyncio.sleep(0.002)
            assert not any(c.ended.is_set() for c in clients)
            servers["d0"].engine.process.kill()  # type: ignore[attr-defined]
            cluster.instances.join(msgspec.structs.replace(servers["d1"].member.spec, role=Role.DECODE, incarnation=1))
            found = await asking
            assert max(int(str(cluster.timeline(i)["attempts"])) for i in range(3)) == 2
            del taking_part["d0"]  # which is not at rest
        are_right(found)
        if sampling is GREEDY:
            assert found == expected

    play(served.make(tmp_path, **SLOW), "shm", scenario, names="p d0 d1", eos_ids=(served.EOS,))
