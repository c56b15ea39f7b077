"""Engines over a tiny model: what they say of their leases, and how a request goes on that has lost all its KV."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from pdlab.real.api.legs import NOWHERE
from pdlab.real.engine.messages import AskLease, Cancel, Export, Held, Holds, Landed, Receive, Release, RenewLease, Sampling, Source, Staged
from pdlab.real.engine.options import EngineOptions
from pdlab.real.transfer.result import TransferResult
from tests.support.engine_nodes import BLOCK, Node, node, submit, until

GREEDY = Sampling(max_tokens=12, temperature=0.0)
PENALISED = Sampling(max_tokens=12, temperature=0.0, presence_penalty=1.5, frequency_penalty=1.0, repetition_penalty=1.3)
DRAWN = Sampling(max_tokens=12, seed=3, top_p=0.9, frequency_penalty=0.5, min_tokens=8)
PROMPT = [random.Random(5).randrange(256) for _ in range(30)]


@pytest.fixture
def start(model: Path) -> Iterator[Callable[..., Node]]:
    options = EngineOptions(model=str(model), block_tokens=BLOCK, kv_blocks=300, max_batch_tokens=48, threads=1, kv_name="x")
    with ExitStack() as stack:
        yield lambda name, **more: stack.enter_context(node(name, options, **more))


def leased(p: Node, id: int, sampling: Sampling = GREEDY, prompt: list[int] = PROMPT) -> Source:
    p.tell(submit(id, prompt, sampling, decodes_here=False))
    held = until(lambda: p.news(Held, id) or None, p)[0]
    return Source(p.descriptor, held.lease, held.blocks, held.kv_tokens)


def holds(p: Node, call: int) -> bool:
    return until(lambda: [m for m in p.line.sent if isinstance(m, Holds) and m.call == call], p)[0].holds


def test_an_engine_tells_whether_a_lease_holds(start: Callable[..., Node]) -> None:
    p = start("p")
    lease = leased(p, 0).lease
    for call, (told, expected) in enumerate([(RenewLease(lease), True), (RenewLease("no such"), False), (Release(lease), False)]):
        p.tell(told)
        p.tell(AskLease(call, told.lease))
        assert holds(p, call) is expected
    p.at_rest()


def test_a_read_ends_when_its_source_says_that_the_lease_has_ended(start: Callable[..., Node], monkeypatch: pytest.MonkeyPatch) -> None:
    p, d = start("p"), start("d", lease_s=0.3)

    async def never(*_: object, **__: object) -> TransferResult:
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr(d.kv_service.endpoint, "pull", never)
    source = leased(p, 0)
    d.tell(Receive(submit(0, PROMPT, GREEDY), [], source, deadline_s=1000.0))
    until(lambda: d.kv_service.receiving.inbound, d)
    p.tell(Release(source.lease))
    until(lambda: d.finish(0), p, d)
    assert "has ended at its source" in d.error(0)
    until(lambda: not d.kv_service.receiving.inbound, d)
    p.at_rest()
    d.at_rest()


@pytest.mark.parametrize("made", [1, 3, 10, 11])
@pytest.mark.parametrize("sampling", [GREEDY, PENALISED, DRAWN], ids=["greedy", "penalised", "drawn"])
def test_a_request_goes_on_exactly_after_the_tokens_its_client_has(sampling: Sampling, made: int, start: Callable[..., Node]) -> None:
    """Computed anew in one place, or in one and decoded in another, whose leg is given what was made."""
    p, d = start("p"), start("d")
    p.tell(submit(0, PROMPT, sampling))
    until(lambda: p.finish(0), p)
    whole = p.tokens(0)
    given = whole[:made]
    d.tell(Receive(submit(1, PROMPT, sampling), given, NOWHERE))
    until(lambda: d.finish(1), d)
    assert d.news(Landed, 1)[0].made == made
    assert given + d.tokens(1) == whole
    source = leased(p, 2, sampling, PROMPT + given[:-1])
    d.tell(Receive(submit(3, PROMPT, sampling), given, source))
    until(lambda: d.finish(3), p, d)
    assert given + d.tokens(3) == whole
    until(lambda: not p.kv_service.lending.lent, p, d)
    p.at_rest()
    d.at_rest()


def test_a_request_that_goes_on_may_be_cancelled_or_refused(start: Callable[..., Node]) -> None:
    p = start("p")
    p.tell(Receive(submit(0, PROMPT, GREEDY), [1, 2], NOWHERE))
    p.tell(Cancel(0))
    until(lambda: p.finish(0), p)
    assert p.finish(0) == "abort"
    p.tell(Receive(submit(1, PROMPT * 100, GREEDY), [1, 2], NOWHERE))
    until(lambda: p.finish(1), p)
    assert "exceed" in p.error(1)
    p.at_rest()


def test_a_migration_of_what_fills_no_block_yet_is_a_migration(start: Callable[..., Node]) -> None:
    p, d = start("p"), start("d")
    long = Sampling(max_tokens=200, temperature=0.0)
    p.engine.step_limit = 1
    p.tell(submit(0, [1], long))
    until(lambda: len(p.tokens(0)) > 1, p)
    p.tell(Export(1, 0))
    found = until(lambda: p.exported(1), p)
    assert (found.error, found.blocks) == ("", [])
    d.tell(Receive(submit(5, [1], long), found.made, Source(p.descriptor, found.lease, found.blocks, found.kv_tokens), last=False))
    until(lambda: d.news(Staged, 5), p, d)
    assert not d.news(Landed, 5)
    p.tell(Cancel(0))
    d.tell(Cancel(5))
    until(lambda: not (p.engine.groups or d.engine.groups or d.kv_service.receiving.inbound), p, d)
