"""What the live world asks of instances and tells clients and router, leg by leg, against instances that follow a script."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest

from pdlab.core.policy import Policy
from pdlab.core.router import Router
from pdlab.core.types import CAPABILITIES, Drained, Event, InstanceSpec, Leads, Left, Report, Role, Scale, Stage, Suspected, UsageError
from pdlab.core.view import Cluster, Instance
from pdlab.experiment.deployment import TransferSpec
from pdlab.real.api.backend import Ended
from pdlab.real.engine.messages import Sampling, Tokens
from pdlab.real.net.http import Broken
from pdlab.real.net.wire import Continue, Extra, KvParams, StreamEvent
from pdlab.real.router.remote import Hear, InstanceFull, LegAsk, LegNews, LegTokens, Prefilled, Unfit
from pdlab.real.router.world import LiveWorld
from tests.support.virtual import VirtualLoop, run

GREEDY = Sampling(max_tokens=4, temperature=0.0)
PARAMS = KvParams(do_remote_prefill=True, remote_engine_id="p", remote_request_id="lease-1")
RAW = b'{"do_remote_prefill":true,"remote_engine_id":"p","remote_request_id":"lease-1","unheard_of":[1]}'


class Scripted:
    """A Remote that answers as it is told; every ask, and every other call, is kept."""

    def __init__(self, spec: InstanceSpec) -> None:
        self.spec = spec
        self.asks: list[LegAsk] = []
        self.calls: list[object] = []
        self.answer: Prefilled | Exception = Prefilled(100, "length", raw_params=RAW, params=PARAMS)
        self.streams: list[Callable[[LegAsk], AsyncIterator[LegNews]]] = []
        self.is_alive = True
        self.trouble: Exception | None = None

    async def prefill(self, ask: LegAsk) -> Prefilled:
        self.asks.append(ask)
        await asyncio.sleep(0.1)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    async def decode(self, ask: LegAsk, hear: Hear) -> None:
        self.asks.append(ask)
        async for news in self.streams.pop(0)(ask):
            hear(news)

    async def proceed(self, go: Continue) -> None:
        self.calls.append(go)
        if self.trouble is not None:
            raise self.trouble

    async def release(self, lease: str) -> None:
        self.calls.append(("release", lease))

    async def renew(self, lease: str) -> bool:
        self.calls.append(("renew", lease))
        return True

    def close(self) -> None:
        self.hung_up = True

    async def alive(self, within_s: float = 1.0) -> bool | None:
        return self.is_alive

    async def load(self) -> Report | None:
        return None

    async def rejoin(self) -> None: ...

    async def switch(self, role: Role) -> None:
        self.calls.append(role)
        if self.trouble is not None:
            raise self.trouble

    async def drain(self) -> None:
        self.calls.append("drain")
        if self.trouble is not None:
            raise self.trouble


def says(*news: LegNews | Exception, every_s: float = 0.1) -> Callable[[LegAsk], AsyncIterator[LegNews]]:
    """A stream of these, one by one; an exception is raised."""

    async def stream(ask: LegAsk) -> AsyncIterator[LegNews]:
        for one in news:
            await asyncio.sleep(every_s)
            if isinstance(one, Exception):
                raise one
            yield one

    return stream


def waits(hung_up: asyncio.Event, *news: LegNews) -> Callable[[LegAsk], AsyncIterator[LegNews]]:
    """A stream that says these and no more; `hung_up` is set when its reader has gone."""

    async def stream(ask: LegAsk) -> AsyncIterator[LegNews]:
        try:
            for one in news:
                yield one
            await asyncio.get_running_loop().create_future()
        finally:
            hung_up.set()

    return stream


def tokens(*ids: int, finish: str | None = None, candidate: int = 0) -> LegTokens:
    return LegTokens(candidate, list(ids), finish)


TRANSFERRED = StreamEvent("transferred")


class Scene:
    """A World over scripted instances: p prefills, d and e decode, m does both."""

    def __init__(self, loop: VirtualLoop, policy: Policy | None = None, transfer: TransferSpec | None = None, **router: Any) -> None:
        transfer = transfer or TransferSpec()
        self.loop = loop
        self.remotes: dict[str, Scripted] = {}
        made = Router(policy or Policy(), reserve_first=transfer.reserve_first, first_token=transfer.first_token, **router)
        self.started: list[Role] = []
        self.got: list[Tokens] = []
        self.world = LiveWorld(
            made, self._connect, transfer=transfer, now=loop.time, unix=lambda: 1e9 + loop.time(), seed=5, start=self._start, name="r"
        )

    async def _start(self, role: Role) -> None:
        self.started.append(role)

    def _connect(self, spec: InstanceSpec) -> Scripted:
        return self.remotes.setdefault(spec.name, Scripted(spec))

    def join(self, name: str, capabilities: Sequence[str] = CAPABILITIES, **rest: Any) -> Scripted:
        role = {"p": Role.PREFILL, "d": Role.DECODE, "e": Role.DECODE, "m": Role.MIXED}[name[0]]
        self.world.instances.join(InstanceSpec(name=name, role=role, kv_blocks=1000, url=name, capabilities=tuple(capabilities), **rest))
        return self.remotes[name]

    def submit(self, sampling: Sampling = GREEDY, prompt: int = 3) -> int:
        return self.world.submit(list(range(prompt)), sampling, self.got.append)

    def text(self, candidate: int = 0) -> list[int]:
        """What the client got of one candidate; asserts that each index came once, in order."""
        found: list[int] = []
        for one in self.got:
            if one.candidate == candidate:
                assert one.start == len(found)
                found += one.tokens
        return found

    @property
    def finishes(self) -> list[str]:
        return [one.finish for one in self.got if one.finish is not None]


def play(main: Callable[[VirtualLoop], Coroutine[Any, Any, Scene]]) -> Scene:
    async def whole(loop: VirtualLoop) -> Scene:
        made = await main(loop)
        made.world.check()
        await made.world.close()
        return made

    return run(whole)


def test_the_decode_leg_goes_on_from_the_prefill_legs_token() -> None:
    async def main(loop: VirtualLoop) -> Scene:
        s = Scene(loop)
        p, d = s.join("p"), s.join("d")
        d.streams.append(says(TRANSFERRED, tokens(101), tokens(102, 103, finish="length")))
        s.submit()
        await asyncio.sleep(1)
        assert p.asks[0].params == KvParams(do_remote_decode=True)
        params = d.asks[0].params
        assert params is not None
        assert params.pdlab is not None
        assert (params.remote_request_id, params.pdlab.made, params.pdlab.events) == ("lease-1", [100], True)
        assert len({ask.leg for ask in (*p.asks, *d.asks)}) == 2
        assert not p.calls, "what was read needs no release"
        return s

    s = play(main)
    assert s.text() == [100, 101, 102, 103]
    assert s.finishes == ["length"]


@pytest.mark.parametrize("told", [True, False])
def test_an_instance_that_serves_alone_tells_when_it_began_and_what_was_cached_unless_it_is_no_pdlab(told: bool) -> None:
    async def main(loop: VirtualLoop) -> Scene:
        s = Scene(loop)
        m = s.join("m", CAPABILITIES if told else ("pull",))
        news = [StreamEvent("prefilled", cached_tokens=2, queue_s=0.05)] if told else []
        m.streams.append(says(*news, tokens(101), tokens(102, finish="length")))
        await asyncio.sleep(0.3)
        s.submit()
        await asyncio.sleep(1)
        assert m.asks[0].params == (KvParams(pdlab=Extra(events=True)) if told else None)
        line = s.world.timeline(0)
        assert line["prefill_start_s"] == pytest.approx(0.35 if told else 0.3)
        assert line["cached_tokens"] == (2 if told else 0)
        return s

    assert play(main).text() == [101, 102]


def test_a_server_that_cannot_go_on_from_a_token_samples_the_first_itself_and_gets_the_parameters_word_for_word() -> None:
    async def main(loop: VirtualLoop) -> Scene:
        s = Scene(loop)
        s.join("p", ("pull",))
        d = s.join("d", ("pull",))
        d.streams.append(says(tokens(90), tokens(91, 92, 93, finish="length")))
        s.submit()
        await asyncio.sleep(1)
        assert d.asks[0].params is None
        assert d.asks[0].raw_params == RAW
        assert s.world.timeline(0)["first_token_s"] == pytest.approx(0.2)
        return s

    assert play(main).text() == [90, 91, 92, 93]


@pytest.mark.parametrize(("answer", "sampling"), [("stop", GREEDY), ("length", Sampling(max_tokens=1, temperature=0.0))])
def test_a_token_of_the_prefill_leg_that_ends_the_request_is_delivered_whoever_sends_the_first(answer: str, sampling: Sampling) -> None:
    async def main(loop: VirtualLoop) -> Scene:
        s = Scene(loop, transfer=TransferSpec(first_token="decode"))
        p = s.join("p")
        s.join("d")
        p.answer = Prefilled(7, answer)
        s.submit(sampling)
        await asyncio.sleep(1)
        return s

    s = play(main)
    assert (s.text(), s.finishes) == ([7], [answer])


def test_the_prompt_of_another_attempt_ends_in_what_the_client_has() -> None:
    async def main(loop: VirtualLoop) -> Scene:
        s = Scene(loop)
        p, d = s.join("p"), s.join("d")
        d.streams += [says(TRANSFERRED, tokens(101), Broken("reset")), says(TRANSFERRED, tokens(103, finish="length"))]
        s.submit(Sampling(max_tokens=4, min_tokens=3, temperature=0.0))
        await asyncio.sleep(0.35)
        p.answer = Prefilled(102, "length", raw_params=RAW, params=PARAMS)
        await asyncio.sleep(1)
        assert p.asks[1].tokens == [0, 1, 2, 100, 101]
        assert (p.asks[1].sampling.max_tokens, p.asks[1].sampling.min_tokens) == (2, 1)
        return s

    assert play(main).text() == [100, 101, 102, 103]


def test_a_stream_that_breaks_after_the_last_token_has_said_all() -> None:
    async def main(loop: VirtualLoop) -> Scene:
        s = Scene(loop)
        m = s.join("m")
        m.streams.append(says(tokens(1, 2), tokens(3, 4), Broken("reset")))
        s.submit()
        await asyncio.sleep(1)
        return s

    s = play(main)
    assert (s.text(), s.finishes) == ([1, 2, 3, 4], ["length"])


def test_several_candidates_are_made_anew_from_one_seed_and_none_hears_a_token_twice() -> None:
    async def main(loop: VirtualLoop) -> Scene:
        s = Scene(loop)
        m = s.join("m")
        m.streams += [
            says(tokens(1), tokens(11, candidate=1), tokens(2), Broken("reset")),
            says(tokens(1, 2), tokens(11, 12, candidate=1, finish="stop"), tokens(3, 4, finish="length")),
        ]
        s.submit(Sampling(max_tokens=4, temperature=1.0, best_of=2))
        await asyncio.sleep(2)
        assert m.asks[0].sampling.seed is not None
        assert m.asks[0].sampling == m.asks[1].sampling
        assert m.asks[0].tokens == m.asks[1].tokens
        return s

    s = play(main)
    assert (s.text(0), s.text(1)) == ([1, 2, 3, 4], [11, 12])


def test_several_candidates_are_all_sampled_by_the_decode_leg() -> None:
    async def main(loop: VirtualLoop) -> Scene:
        s = Scene(loop)
        p, d = s.join("p"), s.join("d")
        d.streams.append(says(TRANSFERRED, tokens(1, 2, finish="stop"), tokens(11, 12, candidate=1, finish="stop")))
        s.submit(Sampling(max_tokens=4, temperature=1.0, best_of=2, stop_token_ids=(5,)))
        await asyncio.sleep(1)
        assert p.asks[0].sampling.best_of == 1
        assert p.asks[0].sampling.ignore_eos
        assert d.asks[0].params is not None
        assert d.asks[0].params.pdlab is not None
        assert d.asks[0].params.pdlab.made == []
        return s

    s = play(main)
    assert (s.text(0), s.text(1)) == ([1, 2], [11, 12])


PUSH = TransferSpec(mode="push", granularity="layer")


def test_a_push_goes_where_blocks_are_reserved_and_starts_no_sooner() -> None:
    async def main(loop: VirtualLoop) -> Scene:
        s = Scene(loop, transfer=PUSH)
        p, d = s.join("p"), s.join("d")
        p.answer = Prefilled(100, "length")
        reserved = StreamEvent("reserved", "ticket-1", "somewhere", [4, 5], 16)
        d.streams.append(says(reserved, TRANSFERRED, tokens(101, 102, 103, finish="length"), every_s=0.15))
        s.submit()
        await asyncio.sleep(0.1)
        assert not p.asks
        await asyncio.sleep(1)
        assert p.asks[0].params is not None
        assert p.asks[0].params.pdlab is not None
        to = p.asks[0].params.pdlab.push
        assert to is not None
        assert (to.descriptor, to.ticket, to.block_ids, to.cached_tokens, to.granularity) == ("somewhere", "ticket-1", [4, 5], 16, "layer")
        assert d.calls == [Continue(d.asks[0].leg, [100])]
        return s

    assert play(main).text() == [100, 101, 102, 103]


def test_a_refused_reservation_sends_no_prompt_and_is_asked_again_elsewhere() -> None:
    async def main(loop: VirtualLoop) -> Scene:
        s = Scene(loop, transfer=PUSH)
        p, d, e = s.join("p"), s.join("d"), s.join("e")
        p.answer = Prefilled(100, "length")
        d.streams.append(says(InstanceFull("no room")))
        e.streams.append(says(StreamEvent("reserved", "t"), TRANSFERRED, tokens(101, finish="stop"), every_s=0.2))
        s.submit()
        await asyncio.sleep(2)
        assert len(p.asks) == 1
        assert s.world.timeline(0)["attempts"] == 1
        return s

    assert play(main).text() == [100, 101]


@pytest.mark.parametrize("transfer", [None, PUSH], ids=["pull", "push"])
def test_the_row_of_a_request_says_nothing_of_an_instance_that_refused_it(transfer: TransferSpec | None) -> None:
    async def main(loop: VirtualLoop) -> Scene:
        s = Scene(loop, transfer=transfer)
        s.join("p")
        d = s.join("d")
        d.streams.append(says(InstanceFull("no room")))
        s.submit()
        await asyncio.sleep(1)
        s.world.cancel(0)
        return s

    (row,) = play(main).world.lines.book.records.frame().itertuples()
    assert row.status == "aborted"
    assert row.attempts == (1 if transfer is None else 0), "a prompt is sent when room is reserved for it"
    assert math.isnan(row.handoff_s) and not isinstance(row.decode_instance, str)


def test_the_row_of_a_request_is_about_its_last_attempt() -> None:
    async def main(loop: VirtualLoop) -> Scene:
        s = Scene(loop)
        s.join("p")
        d = s.join("d")
        d.streams += [says(TRANSFERRED, tokens(101), Broken("reset")), says(TRANSFERRED, tokens(102, 103, finish="length"))]
        s.submit()
        await asyncio.sleep(2)
        return s

    (row,) = play(main).world.lines.book.records.frame().itertuples()
    assert (row.status, row.attempts) == ("done", 2)
    assert row.first_token_s == pytest.approx(0.1)
    assert row.dispatched_s == row.prefill_start_s == pytest.approx(0.4)
    assert row.handoff_s == pytest.approx(0.5) and row.decode_start_s == row.transfer_end_s == pytest.approx(0.6)


def test_a_token_that_ends_the_request_frees_what_was_reserved() -> None:
    async def main(loop: VirtualLoop) -> Scene:
        s = Scene(loop, transfer=PUSH)
        p, d = s.join("p"), s.join("d")
        p.answer = Prefilled(7, "stop")
        hung_up = asyncio.Event()
        d.streams.append(waits(hung_up, StreamEvent("reserved", "t")))
        s.submit()
        await asyncio.wait_for(hung_up.wait(), 5)
        return s

    s = play(main)
    assert (s.text(), s.finishes) == ([7], ["stop"])


def test_a_reserved_leg_that_cannot_be_told_costs_an_attempt_and_is_hung_up() -> None:
    async def main(loop: VirtualLoop) -> Scene:
        s = Scene(loop, transfer=PUSH)
        p, d = s.join("p"), s.join("d")
        p.answer = Prefilled(100, "length")
        hung_up = asyncio.Event()
        d.streams += [
            waits(hung_up, StreamEvent("reserved", "t")),
            says(StreamEvent("reserved", "t"), TRANSFERRED, tokens(101, finish="stop"), every_s=0.2),
        ]
        d.trouble = Broken("no answer")
        s.submit()
        await asyncio.wait_for(hung_up.wait(), 5)
        d.trouble = None
        p.answer = Prefilled(200, "length")
        await asyncio.sleep(2)
        assert s.world.timeline(0)["attempts"] == 2
        return s

    assert play(main).text() == [100, 200, 101]


def test_who_cannot_reserve_pulls_after_all() -> None:
    async def main(loop: VirtualLoop) -> Scene:
        s = Scene(loop, transfer=PUSH)
        p = s.join("p")
        d = s.join("d", ("pull", "made"))
        d.streams.append(says(TRANSFERRED, tokens(101, finish="stop")))
        s.submit()
        await asyncio.sleep(1)
        assert p.asks[0].params == KvParams(do_remote_decode=True)
        return s

    assert play(main).text() == [100, 101]


class Stays(Policy):
    def handoff(self, request: object, cluster: Cluster) -> Instance | None:
        return cluster.prefill[0]


@pytest.mark.parametrize("first_token", ["prefill", "decode"])
def test_a_request_that_stays_goes_on_from_the_token_that_is_there(first_token: Any) -> None:
    async def main(loop: VirtualLoop) -> Scene:
        s = Scene(loop, Stays(), TransferSpec(first_token=first_token))
        p = s.join("p")
        s.join("d")
        p.streams.append(says(TRANSFERRED, tokens(101, 102, 103, finish="length")))
        s.submit()
        await asyncio.sleep(1)
        assert p.asks[1].params is not None
        assert p.asks[1].params.pdlab is not None
        assert p.asks[1].params.pdlab.made == [100]
        return s

    assert play(main).text() == [100, 101, 102, 103]


def test_a_request_that_stays_at_a_server_that_cannot_resume_is_asked_for_plainly_and_its_lease_released() -> None:
    async def main(loop: VirtualLoop) -> Scene:
        s = Scene(loop, Stays())
        p = s.join("p", ("pull",))
        s.join("d")
        p.streams.append(says(tokens(100), tokens(101, 102, 103, finish="length")))
        s.submit()
        await asyncio.sleep(1)
        assert p.asks[1].params is None
        assert p.asks[1].raw_params is None
        assert p.calls == [("release", "lease-1")]
        return s

    assert play(main).text() == [100, 101, 102, 103]


@dataclass
class Moves(Policy):
    tick_s: float | None = 0.1

    def migrate(self, cluster: Cluster) -> Sequence[tuple[int, Instance]]:
        running = [live for live in cluster.live.values() if live.stage is Stage.DECODE and live.decode is cluster.instances[0]]
        return [(live.request.id, cluster.instances[1]) for live in running]


@pytest.mark.parametrize("late_s", [0.0, 0.5])
def test_the_tokens_of_a_migrations_two_ends_are_put_in_order(late_s: float) -> None:
    """The destination speaks before the source has said all it made."""

    async def main(loop: VirtualLoop) -> Scene:
        s = Scene(loop, Moves())
        one, two = s.join("m1"), s.join("m2")
        one.streams.append(says(tokens(1), tokens(2), tokens(3), StreamEvent("moved"), every_s=0.08 + late_s))
        two.streams.append(says(StreamEvent("transferred", made=3), tokens(4), tokens(5, 6, finish="length"), every_s=0.05))
        s.world.open()
        s.submit(Sampling(max_tokens=6, temperature=0.0))
        await asyncio.sleep(4)
        params = two.asks[0].params
        assert params is not None
        assert params.pdlab is not None
        assert params.pdlab.migrate is not None
        assert (params.pdlab.migrate.url, params.pdlab.migrate.leg) == ("m1", one.asks[0].leg)
        assert s.world.timeline(0)["migrations"] == 1
        assert s.world.timeline(0)["decode_instance"] == "m2"
        return s

    s = play(main)
    assert s.text() == [1, 2, 3, 4, 5, 6]
    assert s.finishes == ["length"]


def test_what_an_instance_cannot_serve_is_told_to_the_client() -> None:
    async def main(loop: VirtualLoop) -> Scene:
        s = Scene(loop)
        s.join("m").streams.append(says(Unfit("too long")))
        s.submit()
        await asyncio.sleep(1)
        return s

    (ended,) = play(main).got
    assert isinstance(ended, Ended)
    assert (ended.finish, ended.error, ended.stage, ended.unfit) == ("error", "too long", Stage.FAILED, True)


@dataclass
class Hears(Policy):
    def __post_init__(self) -> None:
        self.left: list[Left] = []

    def dispatch(self, request: object, cluster: Cluster) -> Instance:
        return cluster.prefill[0]

    def observe(self, event: Event, cluster: Cluster) -> None:
        if isinstance(event, Left):
            self.left.append(event)


def test_a_dead_instance_is_told_of_once_with_what_each_client_has() -> None:
    hears = Hears()

    async def main(loop: VirtualLoop) -> Scene:
        s = Scene(loop, hears)
        one, two = s.join("m1"), s.join("m2")
        one.streams += [says(tokens(1), Broken("reset")), says(tokens(1), tokens(2), Broken("reset"), every_s=0.05)]
        two.streams += [says(tokens(2, 3, 4, finish="length")), says(tokens(3, 4, finish="length"))]
        one.is_alive = False
        got: list[list[Tokens]] = [[], []]
        for mine in got:
            s.world.submit([0, 1], GREEDY, mine.append)
        await asyncio.sleep(3)
        for mine in got:
            assert [token for one in mine for token in one.tokens] == [1, 2, 3, 4]
        return s

    play(main)
    assert hears.left == [Left("m1", 0, {0: 1, 1: 2})]


def test_reports_are_stamped_with_the_routers_clock_and_a_clock_far_off_is_not_believed() -> None:
    async def main(loop: VirtualLoop) -> Scene:
        s = Scene(loop)
        s.join("m")
        await asyncio.sleep(10)
        seen = []
        for unix_s in (1e9 + 9.5, 1e9 + 12.0, 55.0):
            s.world.instances.report(Report("m", taken_s=unix_s))
            seen.append(s.world.router.by_name["m"].report.taken_s)
        assert seen == [pytest.approx(9.5), 10.0, 10.0]
        return s

    assert len(play(main).world.lines.book.samples) == 3


def test_what_an_instance_says_anew_of_itself_reaches_the_router() -> None:
    async def main(loop: VirtualLoop) -> Scene:
        s = Scene(loop)
        s.join("m")
        known = s.world.router.by_name["m"]
        s.join("m", draining=True)
        assert not known.ready
        s.world.instances.other(Drained("m", 0, False))
        assert known.ready
        s.world.instances.join(msgspec.structs.replace(known.spec, role=Role.DECODE))
        assert known.role is Role.DECODE
        s.world.instances.other(Suspected("m", 0))
        s.world.instances.other(Leads(False))
        assert not s.world.router.leads
        s.join("m", incarnation=4)
        assert s.world.router.by_name["m"].spec.incarnation == 4
        s.world.instances.leave("m", 0)
        assert s.world.router.by_name["m"].ready
        s.world.instances.leave("m", 4)
        assert not s.world.router.by_name["m"].ready
        return s

    play(main)


@dataclass
class Shrinks(Policy):
    tick_s: float | None = 1.0

    def resize(self, cluster: Cluster) -> Sequence[tuple[Instance, Role] | Scale]:
        return [Scale(-1, Role.DECODE)]


@dataclass
class Resizes(Policy):
    tick_s: float | None = 1.0

    def resize(self, cluster: Cluster) -> Sequence[tuple[Instance, Role] | Scale]:
        return [(cluster.decode[-1], Role.PREFILL)] if len(cluster.decode) > 1 else []


@pytest.mark.parametrize("alive", [True, False])
def test_a_switch_that_is_not_taken_leaves_the_instance_as_it_was_or_finds_it_dead(alive: bool) -> None:
    async def main(loop: VirtualLoop) -> Scene:
        s = await asked_in_vain(loop, Resizes(), alive)
        assert s.world.router.by_name["e"].role is Role.DECODE
        return s

    assert play(main).remotes["e"].calls == [Role.PREFILL]


@pytest.mark.parametrize("alive", [True, False])
def test_an_instance_that_does_not_take_its_stop_stays_or_is_found_dead(alive: bool) -> None:
    async def main(loop: VirtualLoop) -> Scene:
        return await asked_in_vain(loop, Shrinks(), alive, autoscale=(2, 3))

    assert play(main).remotes["e"].calls == ["drain"]


async def asked_in_vain(loop: VirtualLoop, policy: Policy, alive: bool, **more: Any) -> Scene:
    """What the policy asks of e at the first tick does not reach it."""
    s = Scene(loop, policy, **more)
    s.join("p")
    s.join("d")
    e = s.join("e")
    e.trouble, e.is_alive = Broken("no answer"), alive
    s.world.open()
    await asyncio.sleep(1.5)
    assert s.world.router.by_name["e"].ready is alive
    return s


@dataclass
class Grows(Policy):
    tick_s: float | None = 1.0

    def resize(self, cluster: Cluster) -> Sequence[tuple[Instance, Role] | Scale]:
        return [Scale(3, Role.DECODE)]


def test_scaling_asks_for_as_many_as_may_be_started_and_needs_somebody_to_start_them() -> None:
    async def main(loop: VirtualLoop) -> Scene:
        with pytest.raises(UsageError, match="autoscale"):
            LiveWorld(Router(Grows(), autoscale=(1, 2)), Scripted, transfer=TransferSpec(), now=loop.time)
        s = Scene(loop, Grows(), autoscale=(1, 2))
        s.world.open()
        await asyncio.sleep(3.5)
        return s

    assert play(main).started == [Role.DECODE, Role.DECODE]


class Wrong(Policy):
    def dispatch(self, request: object, cluster: Cluster) -> Instance:
        raise ZeroDivisionError("division by zero")


def test_a_policys_mistake_ends_every_request_and_says_whose_it_was() -> None:
    async def main(loop: VirtualLoop) -> Scene:
        s = Scene(loop, Wrong())
        s.join("m")
        s.submit()
        s.submit()
        await asyncio.sleep(0)
        assert s.world.down is not None
        assert "Wrong.dispatch" in s.world.down
        return s

    s = play(main)
    assert s.finishes == ["error", "error"]
