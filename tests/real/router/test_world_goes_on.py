"""What an instance is asked for when the request has lost the one before: what its client has is kept, and only what follows is made."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from pdlab.real.engine.messages import StructuredOutputs
from pdlab.real.router.remote import LegAsk
from tests.real.router import test_world_migration
from tests.support.virtual_cluster import DECODE_FIRST, PULL, TRANSFERS, Client, Run, cluster, played, small, word

PLAIN = {"temperature": 0.0}
LOOKING_BACK = {
    "seeded": {"temperature": 1.0, "seed": 5},
    "drawn": {"temperature": 0.7},
    "penalised": {"temperature": 0.0, "frequency_penalty": 1.0},
    "structured": {"temperature": 0.0, "structured": StructuredOutputs(regex="[a-z]*")},
}
SAMPLINGS = pytest.mark.parametrize("sampling", LOOKING_BACK.values(), ids=LOOKING_BACK)
PROMPT, OUTPUT = 500, 60


async def loses(made: Run, sampling: dict[str, Any], *names: str, after: int = 10) -> tuple[Client, list[int], list[LegAsk]]:
    """A request whose instances die when its client has that many tokens: it, what it had, and what was asked for from then on."""
    client = made.submit(PROMPT, OUTPUT, **sampling)
    await made.until(lambda: len(client.tokens) >= after, 10.0)
    had, asked = list(client.tokens), len(made.rack.asked)
    for name in names:
        made.rack.instances[name].kill()
    await made.until(lambda: client.ended is not None, 60.0)
    assert client.done
    return client, had, made.rack.asked[asked:]


def prompt_of(client: Client) -> list[int]:
    return [word(client.id, place) for place in range(PROMPT)]


def made_of(ask: LegAsk) -> list[int]:
    return ask.params.pdlab.made if ask.params is not None and ask.params.pdlab is not None else []


def decodes(ask: LegAsk) -> bool:
    return ask.params is None or not ask.params.do_remote_decode


@TRANSFERS
def test_a_greedy_request_has_what_was_sent_as_part_of_its_prompt(transfer: dict[str, Any]) -> None:
    async def play(made: Run) -> None:
        client, had, asked = await loses(made, PLAIN, "decode-0")
        assert len(asked) == 2
        for ask in asked:
            assert ask.tokens == prompt_of(client) + had
            assert ask.sampling.max_tokens == OUTPUT - len(had)

    played(cluster(transfer, decode=2), play)


@SAMPLINGS
@TRANSFERS
def test_one_whose_next_token_depends_on_the_last_ones_has_them_as_its_output(transfer: dict[str, Any], sampling: dict[str, Any]) -> None:
    """With the seed and in the place in which it was to be drawn; the prefill instance's own token is not used."""

    async def play(made: Run) -> None:
        client, had, asked = await loses(made, sampling, "decode-0")
        seeds = {ask.sampling.seed for ask in made.rack.asked}
        assert len(seeds) == 1
        assert seeds == {sampling.get("seed")} or "seed" not in sampling
        (prefill,), (decode,) = [ask for ask in asked if not decodes(ask)], [ask for ask in asked if decodes(ask)]
        assert prefill.tokens == prompt_of(client) + had[:-1]
        assert prefill.sampling.ignore_eos
        assert (decode.tokens, made_of(decode), decode.sampling.max_tokens) == (prompt_of(client), had, OUTPUT)

    played(cluster(transfer, decode=2), play)


@SAMPLINGS
@TRANSFERS
def test_with_one_role_left_it_is_computed_and_goes_on_in_one_place(transfer: dict[str, Any], sampling: dict[str, Any]) -> None:
    async def play(made: Run) -> None:
        client, had, asked = await loses(made, sampling, "decode-0", "decode-1")
        (alone,) = asked[-1:]
        assert (alone.tokens, made_of(alone)) == (prompt_of(client), had)
        assert alone.params is not None
        assert alone.params.remote_request_id is None

    played(cluster(transfer, decode=2), play)


@SAMPLINGS
@TRANSFERS
def test_it_may_be_lost_again_and_again(transfer: dict[str, Any], sampling: dict[str, Any]) -> None:
    async def play(made: Run) -> None:
        clients = [made.submit(PROMPT, OUTPUT, **sampling) for _ in range(4)]
        for after in (1, 2, 30):
            await made.until(lambda after=after: all(len(c.tokens) >= after for c in clients), 30.0)  # type: ignore[misc]
            made.rack.instances["decode-0"].kill()
            await asyncio.sleep(0.05)
            made.rack.bring_up("decode-0")
        await made.until(lambda: all(c.ended for c in clients), 60.0)

    experiment = small(decode=2, transfer=transfer, limits={"request_timeout_s": 60.0, "max_attempts": 9})
    made = played(experiment, play)
    assert all(client.done for client in made.clients.values())


@SAMPLINGS
def test_what_goes_on_may_be_migrated(sampling: dict[str, Any]) -> None:
    async def play(made: Run) -> None:
        clients = [made.submit(PROMPT, 300, **sampling) for _ in range(4)]
        await made.until(lambda: all(len(c.tokens) >= 10 for c in clients), 10.0)
        for name in ("decode-0", "decode-1"):
            made.rack.instances[name].kill()
            made.rack.bring_up(name)
        began = [len(c.tokens) for c in clients]
        await made.until(lambda: all(c.ended for c in clients), 60.0)
        assert min(began) < 100
        for line in (made.world.timeline(c.id) for c in clients):
            assert line["attempts"] == 2
            assert line["migrations"] > 2

    made = played(cluster(PULL, decode=2, policy=f"{test_world_migration.__file__}:Shuttle"), play)
    assert all(client.done for client in made.clients.values())


@SAMPLINGS
@TRANSFERS
def test_what_goes_on_stays_where_its_kv_does_not_reach_anybody(transfer: dict[str, Any], sampling: dict[str, Any]) -> None:
    async def play(made: Run) -> None:
        made.rack.cuts["prefill-0", "decode-1"] = 0.1
        client, had, asked = await loses(made, sampling, "decode-0")
        assert made.world.timeline(client.id)["decode_instance"] == "prefill-0"
        assert (asked[-1].tokens, made_of(asked[-1])) == (prompt_of(client), had)

    played(cluster(transfer, decode=2), play)


def test_without_instances_that_can_go_on_from_given_tokens_they_are_part_of_the_prompt() -> None:
    async def play(made: Run) -> None:
        for name in list(made.rack.instances):
            made.rack.instances[name].kill()
            made.world.instances.leave(name, 0)
            made.rack.bring_up(name, ("pull",))
        client, had, asked = await loses(made, LOOKING_BACK["seeded"], "decode-0")
        assert [ask.tokens for ask in asked] == [prompt_of(client) + had] * 2

    played(cluster(DECODE_FIRST, decode=2), play)


STRUCTURED = LOOKING_BACK["structured"]


async def only_pulls(made: Run) -> None:
    for name in list(made.rack.instances):
        made.rack.instances[name].kill()
        made.world.instances.leave(name, 0)
        made.rack.bring_up(name, ("pull",))


def test_without_such_instances_one_with_a_grammar_is_made_anew_and_the_client_gets_what_follows() -> None:
    """Its grammar's place cannot be told to them."""

    async def play(made: Run) -> None:
        await only_pulls(made)
        client, had, asked = await loses(made, STRUCTURED, "decode-0")
        assert had
        assert [(ask.tokens, ask.sampling.max_tokens) for ask in asked] == [(prompt_of(client), OUTPUT)] * 2
        assert made.world.timeline(client.id)["attempts"] == 2

    played(cluster(PULL, decode=2), play)


def test_what_is_made_anew_and_differs_is_not_sent_after_what_the_client_has() -> None:
    async def play(made: Run) -> None:
        await only_pulls(made)
        client = made.submit(PROMPT, OUTPUT, **STRUCTURED)
        await made.until(lambda: len(client.tokens) >= 10, 10.0)
        live = made.world.requests.by_id[client.id]
        live.candidates[0].tokens[3] += 1  # as if the lost instance had said so
        made.rack.instances["decode-0"].kill()
        await made.until(lambda: client.ended is not None, 120.0)
        assert not client.done
        assert len(client.tokens) < OUTPUT
        assert client.ended is not None and "differs from what the client has" in client.ended.error

    played(cluster(PULL, decode=2), play)
