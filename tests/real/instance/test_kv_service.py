"""Two engines exchange KV over real transports: the same tokens as one alone, by pull and by each push, through migrations, refusals,
cancellations and deaths; and nothing stays behind."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest
from transformers import PreTrainedModel

from pdlab.real.engine.load import load
from pdlab.real.engine.messages import (
    Cancel,
    Export,
    Exported,
    Full,
    Held,
    Landed,
    Missed,
    Proceed,
    Push,
    Receive,
    Release,
    Reserved,
    Resume,
    Sampling,
    Source,
    Staged,
)
from pdlab.real.engine.options import EngineOptions
from tests.support.engine_driver import Driver
from tests.support.engine_nodes import BLOCK, Node, node, submit, until

Tiny = Callable[[str], tuple[Path, PreTrainedModel]]
GREEDY = Sampling(max_tokens=12, temperature=0.0)
DRAWN = Sampling(max_tokens=12, seed=3, top_p=0.9, frequency_penalty=0.5)


@pytest.fixture
def options(tiny: Tiny, request: pytest.FixtureRequest) -> EngineOptions:
    """Of as many ranks as the parameter says."""
    tp, model = getattr(request, "param", 1), str(tiny("qwen3")[0])
    return EngineOptions(model=model, block_tokens=BLOCK, kv_blocks=300, max_batch_tokens=48, threads=1, kv_name="x", tp=tp)


@pytest.fixture
def alone(options: EngineOptions) -> Callable[[list[int], Sampling], list[int]]:
    driver = Driver(load(options).engine)
    ids = iter(range(10_000))

    def tokens(prompt: list[int], sampling: Sampling, candidate: int = 0) -> list[int]:
        id = next(ids)
        driver.submit(id, prompt, sampling)
        driver.run()
        return driver.tokens[id, candidate]

    return tokens


@pytest.fixture
def start(options: EngineOptions) -> Iterator[Callable[..., Node]]:
    with ExitStack() as stack:
        yield lambda name, transport="auto", lease_s=30.0, **more: stack.enter_context(
            node(name, msgspec.structs.replace(options, lease_s=lease_s, **more), transport=transport, lease_s=lease_s)
        )


def prompts(count: int) -> list[list[int]]:
    rng = random.Random(1)
    shared = [rng.randrange(300) for _ in range(21)]
    return [shared[: rng.choice((0, 8, 21))] + [rng.randrange(300) for _ in range(rng.choice((1, 3, 4, 30, 90)))] for _ in range(count)]


def source(p: Node, held: Held | Exported) -> Source:
    return Source(p.descriptor, held.lease, held.blocks, held.kv_tokens)


def held(p: Node, id: int, *others: Node) -> Held:
    return until(lambda: p.news(Held, id) or None, p, *others)[0]


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("first_token", ["prefill", "decode"])
@pytest.mark.parametrize("sampling", [GREEDY, DRAWN])
def test_a_pull_gives_the_tokens_of_one_alone(
    sampling: Sampling, first_token: str, transport: str, start: Callable[..., Node], alone: Callable[..., list[int]]
) -> None:
    p, d = start("p", transport), start("d", transport)
    for id, prompt in enumerate(prompts(6)):
        p.tell(submit(id, prompt, sampling, decodes_here=False))
        lease = held(p, id)
        made = p.tokens(id) if first_token == "prefill" else []
        d.tell(Receive(submit(id, prompt, sampling), made, source(p, lease)))
        until(lambda id=id: d.finish(id), p, d)  # type: ignore[misc]
        assert d.news(Landed, id)[0].transport == transport
        assert made + d.tokens(id) == alone(prompt, sampling)
    until(lambda: not p.kv_service.lending.lent, p, d)
    p.at_rest()
    d.at_rest()


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("granularity", ["request", "chunk", "layer"])
def test_a_push_gives_the_tokens_of_one_alone(
    granularity: str, transport: str, start: Callable[..., Node], alone: Callable[..., list[int]]
) -> None:
    p, d = start("p", transport), start("d", transport)
    for id, prompt in enumerate(prompts(6)):
        d.tell(Receive(submit(id, prompt, DRAWN), last=False))
        place = until(lambda id=id: d.news(Reserved, id) or None, d)[0]  # type: ignore[misc]
        push = Push(d.descriptor, place.ticket, place.blocks, place.cached_tokens, granularity)
        p.tell(msgspec.structs.replace(submit(id, prompt, DRAWN, decodes_here=False), push=push))
        until(lambda id=id: p.finish(id), p, d)  # type: ignore[misc]
        d.tell(Proceed(id, p.tokens(id)))
        until(lambda id=id: d.finish(id), p, d)  # type: ignore[misc]
        assert p.tokens(id) + d.tokens(id) == alone(prompt, DRAWN)
    until(lambda: not p.kv_service.lending.pushes.live, p, d)
    p.at_rest()
    d.at_rest()


def test_room_taken_before_the_prefill_can_be_filled_by_a_pull(start: Callable[..., Node], alone: Callable[..., list[int]]) -> None:
    p, d = start("p"), start("d")
    prompt = prompts(4)[3]
    d.tell(Receive(submit(0, prompt, GREEDY), last=False))
    until(lambda: d.news(Reserved, 0) or None, d)
    p.tell(submit(0, prompt, GREEDY, decodes_here=False))
    d.tell(Proceed(0, [], source(p, held(p, 0, d))))
    until(lambda: d.finish(0), p, d)
    assert d.tokens(0) == alone(prompt, GREEDY)
    until(lambda: not p.kv_service.lending.lent, p, d)
    p.at_rest()
    d.at_rest()


@pytest.mark.parametrize("made_counts", [True, False])
def test_candidates_of_best_of_share_the_prompt_that_came(made_counts: bool, start: Callable[..., Node], options: EngineOptions) -> None:
    p, d = start("p"), start("d")
    sampling = Sampling(max_tokens=8, seed=9, best_of=3)
    prompt = prompts(6)[4]
    reference = Driver(load(options).engine)
    reference.submit(0, prompt, sampling)
    reference.run()
    p.tell(submit(0, prompt, msgspec.structs.replace(sampling, best_of=1), decodes_here=False))
    lease = held(p, 0)
    made = p.tokens(0) if made_counts else []
    d.tell(Receive(submit(0, prompt, sampling), made, source(p, lease)))
    until(lambda: all(d.finish(0, i) for i in range(3)), p, d)
    assert [([] if i else made) + d.tokens(0, i) for i in range(3)] == [reference.tokens[0, i] for i in range(3)]
    until(lambda: not p.kv_service.lending.lent, p, d)
    p.at_rest()
    d.at_rest()


@pytest.mark.parametrize("made_counts", [True, False])
def test_what_is_leased_may_be_decoded_where_it_is(made_counts: bool, start: Callable[..., Node], alone: Callable[..., list[int]]) -> None:
    p = start("p")
    prompt = prompts(2)[1]
    p.tell(submit(0, prompt, msgspec.structs.replace(DRAWN, max_tokens=1), decodes_here=False))
    lease = held(p, 0)
    first = p.tokens(0)
    p.tell(Resume(submit(7, prompt, DRAWN), lease.lease, first if made_counts else []))
    until(lambda: p.finish(7), p)
    assert (first if made_counts else []) + p.tokens(7) == alone(prompt, DRAWN)
    p.tell(Resume(submit(8, prompt, DRAWN), lease.lease, first))
    until(lambda: p.finish(8), p)
    assert "has ended" in p.error(8)
    p.at_rest()


@pytest.mark.parametrize("most", [1, 8])
def test_candidates_of_what_is_decoded_where_it_is_sample_all_their_tokens(
    most: int, start: Callable[..., Node], options: EngineOptions
) -> None:
    p = start("p")
    sampling = Sampling(max_tokens=most, seed=9, best_of=3)
    prompt = prompts(6)[4]
    reference = Driver(load(options).engine)
    reference.submit(0, prompt, sampling)
    reference.run()
    p.tell(submit(0, prompt, Sampling(max_tokens=1, seed=4), decodes_here=False))
    p.tell(Resume(submit(7, prompt, sampling), held(p, 0).lease))
    until(lambda: all(p.finish(7, i) for i in range(3)), p)
    assert [p.tokens(7, i) for i in range(3)] == [reference.tokens[0, i] for i in range(3)]
    p.at_rest()


def migrate(
    src: Node, dst: Node, id: int, prompt: list[int], sampling: Sampling, stages: int, on: Callable[[], None] = lambda: None
) -> int:
    """The staged copy; returns the tokens that the source had made."""
    for stage in range(stages):
        src.tell(Export(stage, id))
        said = until(lambda stage=stage: src.exported(stage), src, dst)  # type: ignore[misc]
        assert not said.error, said.error
        if stage == 0:
            dst.tell(Receive(submit(id, prompt, sampling), said.made, source(src, said), last=False))
        else:
            dst.tell(Proceed(id, said.made, source(src, said), last=False))
        until(lambda stage=stage: len(dst.news(Staged, id)) > stage, src, dst)  # type: ignore[misc]
    on()
    src.tell(Export(99, id, stop=True))
    said = until(lambda: src.exported(99), src, dst)
    assert not said.error, said.error
    dst.tell(Proceed(id, said.made, source(src, said)))
    return len(said.made)


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("sampling", [GREEDY, DRAWN])
def test_a_migration_in_the_middle_changes_nothing(
    sampling: Sampling, stages: int, start: Callable[..., Node], alone: Callable[..., list[int]]
) -> None:
    src, dst = start("d0"), start("d1")
    sampling = msgspec.structs.replace(sampling, max_tokens=60)
    prompt = prompts(6)[5]
    src.engine.step_limit = 1
    src.tell(submit(5, prompt, sampling))
    until(lambda: len(src.tokens(5)) > 3, src)
    made = migrate(src, dst, 5, prompt, sampling, stages)
    until(lambda: dst.finish(5), src, dst)
    until(lambda: src.finish(5), src, dst)
    assert src.finish(5) == "moved"
    assert dst.news(Landed, 5)[0].made == made == len(src.tokens(5))
    assert src.tokens(5) + dst.tokens(5) == alone(prompt, sampling)
    src.at_rest()
    dst.at_rest()


@pytest.mark.parametrize("options", [2], indirect=True, ids=["two ranks"])
@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_ranks_hand_over_as_one_does(transport: str, start: Callable[..., Node], alone: Callable[..., list[int]]) -> None:
    test_a_pull_gives_the_tokens_of_one_alone(DRAWN, "prefill", transport, start, alone)
    test_a_push_gives_the_tokens_of_one_alone("layer", transport, start, alone)
    test_a_migration_in_the_middle_changes_nothing(DRAWN, 2, start, alone)


@pytest.mark.parametrize("how", ["resume", "expiry"])
def test_a_migration_that_is_called_off_goes_on_where_it_was(how: str, start: Callable[..., Node], alone: Callable[..., list[int]]) -> None:
    src = start("d0")
    src.engine.step_limit = 1
    sampling, prompt = msgspec.structs.replace(DRAWN, max_tokens=40), prompts(3)[2]
    src.tell(submit(5, prompt, sampling))
    until(lambda: len(src.tokens(5)) > 3, src)
    src.tell(Export(1, 5, stop=True, lease_s=0.05 if how == "expiry" else 30.0))
    until(lambda: src.exported(1), src)
    before = len(src.tokens(5))
    if how == "resume":
        src.tell(Export(2, 5, resume=True))
    until(lambda: src.finish(5), src)
    assert len(src.tokens(5)) > before
    assert src.tokens(5) == alone(prompt, sampling)
    src.tell(Export(3, 5))
    assert until(lambda: src.exported(3), src).error == "it does not run here"
    src.at_rest()


def test_a_full_destination_says_so_and_keeps_nothing(start: Callable[..., Node]) -> None:
    p, d = start("p"), start("d", kv_blocks=20)
    long, short = [1] * 60, [2] * 40
    for id, prompt in enumerate((long, short)):
        p.tell(submit(id, prompt, GREEDY, decodes_here=False))
        lease = held(p, id)
        if id == 0:
            d.tell(Receive(submit(0, prompt, GREEDY), [], None, last=False))
            until(lambda: d.news(Reserved, 0) or None, d)
            p.tell(Release(lease.lease))
        else:
            d.tell(Receive(submit(1, prompt, GREEDY), [], source(p, lease)))
            until(lambda: d.news(Full, 1) or None, p, d)
    d.tell(Cancel(0))
    until(lambda: d.finish(0) == "abort", d)
    until(lambda: not d.kv_service.receiving.inbound, d)
    d.at_rest()
    d.tell(Receive(submit(2, short, GREEDY), [], source(p, lease)))
    until(lambda: d.finish(2), p, d)
    assert d.finish(2) == "length"
    until(lambda: not p.kv_service.lending.lent, p, d)
    p.at_rest()
    d.at_rest()


def test_a_cancellation_that_crosses_the_end_of_the_prefill_frees_what_it_left(start: Callable[..., Node]) -> None:
    p = start("p")
    p.tell(submit(0, prompts(3)[2], GREEDY, decodes_here=False))
    held(p, 0)
    p.tell(Cancel(0))
    until(lambda: p.line.inbox.empty(), p)
    p.turn()
    p.at_rest()


def test_an_unread_lease_ends_by_its_time_and_a_late_reader_is_told(start: Callable[..., Node]) -> None:
    p, d = start("p", lease_s=0.05), start("d")
    prompt = prompts(3)[2]
    p.tell(submit(0, prompt, GREEDY, decodes_here=False))
    lease = held(p, 0)
    until(lambda: not p.kv_service.lending.lent, p)
    p.at_rest()
    d.tell(Receive(submit(0, prompt, GREEDY), [], source(p, lease)))
    until(lambda: d.finish(0), p, d)
    assert "has ended: expired" in d.error(0)
    assert (d.news(Missed, 0), d.kv_service.receiving.failed, d.kv_service.lending.expired, p.kv_service.lending.expired) == (
        [Missed(0, "expired")],
        1,
        0,
        1,
    )
    d.at_rest()


@pytest.mark.parametrize("step_s", [0.0, 0.3], ids=["between steps", "during a long step"])
def test_kv_that_never_comes_ends_by_the_deadline(step_s: float, start: Callable[..., Node]) -> None:
    d = start("d")
    d.tell(Receive(submit(0, [1, 2, 3, 4, 5], GREEDY), last=False, deadline_s=0.1))
    until(lambda: d.news(Reserved, 0), d)
    time.sleep(step_s)  # the endpoint has the same deadline, and is the first to say so
    until(lambda: d.finish(0), d)
    assert d.error(0) == "not all KV was here after 0.1 s"
    assert d.news(Missed, 0) == [Missed(0, "deadline")]
    until(lambda: not d.kv_service.receiving.inbound, d)
    d.tell(Proceed(0, [7]))  # too late, and harmless
    until(lambda: d.line.inbox.empty(), d)
    d.at_rest()


@pytest.mark.parametrize("granularity", ["request", "layer"])
def test_a_cancelled_prompt_that_is_being_pushed_leaves_nothing(granularity: str, start: Callable[..., Node]) -> None:
    p, d = start("p"), start("d")
    prompt = [3] * 200
    d.tell(Receive(submit(0, prompt, GREEDY), last=False))
    place = until(lambda: d.news(Reserved, 0) or None, d)[0]
    push = Push(d.descriptor, place.ticket, place.blocks, place.cached_tokens, granularity)
    p.tell(msgspec.structs.replace(submit(0, prompt, GREEDY, decodes_here=False), push=push))
    p.turn()
    p.tell(Cancel(0))
    d.tell(Cancel(0))
    until(lambda: p.finish(0), p, d)
    until(lambda: not d.kv_service.receiving.inbound, p, d)
    until(lambda: not p.kv_service.lending.pushes.live, p, d)
    p.at_rest()
    d.at_rest()


@pytest.mark.parametrize("options", [2], indirect=True, ids=["two ranks"])
def test_ranks_whose_push_by_layer_breaks_off_leave_nothing(start: Callable[..., Node]) -> None:
    """Refused from the first layer on; given up by its reader after the first of several passes, and by both sides."""
    p, d = start("p"), start("d")
    for id, known in enumerate((False, True)):
        d.tell(Receive(submit(id, [3] * 200, GREEDY), last=False))
        place = until(lambda id=id: d.news(Reserved, id) or None, d)[0]  # type: ignore[misc]
        push = Push(d.descriptor, place.ticket if known else "unknown", place.blocks, place.cached_tokens, "layer")
        p.tell(msgspec.structs.replace(submit(id, [3 + id] * 200, GREEDY, decodes_here=False), push=push))
        p.turn()
        if known:
            d.tell(Cancel(id))
            d.turn()
        until(lambda id=id: p.finish(id), p, d)  # type: ignore[misc]
        assert p.finish(id) == "held"
        if not known:
            assert not d.kv_service.receiving.received_bytes
            d.tell(Cancel(id))
        until(lambda: not (d.kv_service.receiving.inbound or p.kv_service.lending.pushes.live), p, d)
        p.at_rest()
        d.at_rest()
    test_a_cancelled_prompt_that_is_being_pushed_leaves_nothing("layer", start)


def test_a_reader_of_another_model_is_refused(start: Callable[..., Node], tiny: Tiny) -> None:
    p, d = start("p"), start("d", model=str(tiny("llama")[0]))
    p.tell(submit(0, [1, 2, 3, 4, 5], GREEDY, decodes_here=False))
    lease = held(p, 0)
    d.tell(Receive(submit(0, [1, 2, 3, 4, 5], GREEDY), [], source(p, lease)))
    until(lambda: d.finish(0), p, d)
    assert "KV does not fit" in d.error(0)
    p.tell(Release(lease.lease))
    until(lambda: not p.kv_service.lending.lent, p)
    p.at_rest()
    d.at_rest()


def test_a_source_that_dies_is_noticed(start: Callable[..., Node]) -> None:
    p, d = start("p", "tcp"), start("d", "tcp")
    p.tell(submit(0, [1, 2, 3, 4, 5], GREEDY, decodes_here=False))
    lease = held(p, 0)
    address = source(p, lease)
    p.kv_service.background.run(p.kv_service.endpoint.close())
    d.tell(Receive(submit(0, [1, 2, 3, 4, 5], GREEDY), [], address, deadline_s=5.0))
    until(lambda: d.finish(0), d)
    assert d.finish(0) == "error"
    until(lambda: not d.kv_service.receiving.inbound, d)
    d.at_rest()


def test_many_at_once_in_any_order_change_nothing(start: Callable[..., Node], alone: Callable[..., list[int]]) -> None:
    p, d = start("p"), start("d", max_seqs=16)
    rng = random.Random(2)
    work = dict(enumerate(prompts(24)))
    asked: set[int] = set()
    for id, prompt in work.items():
        p.tell(submit(id, prompt, GREEDY, decodes_here=False))

    def all_done() -> bool:
        for id in work:
            news = p.news(Held, id)
            if news and id not in asked and rng.random() < 0.5:
                asked.add(id)
                d.tell(Receive(submit(id, work[id], GREEDY), p.tokens(id), source(p, news[0])))
            if id in asked and d.news(Full, id) and not d.finish(id):
                d.line.sent[:] = [m for m in d.line.sent if not any(isinstance(n, Full) and n.id == id for n in getattr(m, "news", []))]
                asked.discard(id)
        return all(d.finish(id) for id in work)

    until(all_done, p, d)
    for id, prompt in work.items():
        assert p.tokens(id) + d.tokens(id) == alone(prompt, GREEDY)
    until(lambda: not p.kv_service.lending.lent, p, d)
    p.at_rest()
    d.at_rest()
