"""A cluster as an engine: the OpenAI front serves it unchanged, over a real socket, with scripted instances behind it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import msgspec
import pytest
import uvicorn

from pdlab.core.policy import Policy, Reject
from pdlab.core.router import Router
from pdlab.core.router_limits import Limits
from pdlab.core.types import CAPABILITIES, InstanceSpec, Report, Request, Role, Stage, Tick
from pdlab.core.view import Cluster, Instance
from pdlab.experiment.deployment import TransferSpec
from pdlab.real.api.app import create_app
from pdlab.real.api.backend import Backend, Ended
from pdlab.real.api.http_server import bind
from pdlab.real.api.service import Service
from pdlab.real.engine.messages import FromQueue, Sampling, Submit, Tokens
from pdlab.real.models.tokenizer import Tokenizer
from pdlab.real.net.http import Broken
from pdlab.real.net.wire import Continue, KvParams, StreamEvent
from pdlab.real.router.cluster_engine import ClusterEngine
from pdlab.real.router.remote import Hear, LegAsk, LegTokens, Prefilled
from pdlab.real.router.world import LiveWorld
from pdlab.replay.log import EventLog, Head
from tests.support import echo_engine

PARAMS = KvParams(do_remote_prefill=True, remote_request_id="lease")


class Alphabet:
    """Whatever it is asked, it says a, b, c, ..."""

    def __init__(self, spec: InstanceSpec) -> None:
        self.spec = spec
        self.broken = False
        self.halted = asyncio.Event()  # no prompt is computed until it is set
        self.halted.set()
        self.asks: list[LegAsk] = []

    async def prefill(self, ask: LegAsk) -> Prefilled:
        self.asks.append(ask)
        await self.halted.wait()
        return Prefilled(ord("a"), "length", 2, 0.0, b"{}", PARAMS)

    async def decode(self, ask: LegAsk, hear: Hear) -> None:
        self.asks.append(ask)
        params = ask.params
        made = len(params.pdlab.made) if params is not None and params.pdlab is not None else 0
        if params is not None:
            hear(StreamEvent("transferred", made=made) if params.do_remote_prefill else StreamEvent("prefilled"))
        for candidate in range(ask.sampling.best_of):
            for k in range(made, ask.sampling.max_tokens):
                await asyncio.sleep(0)
                if self.broken:
                    raise Broken("reset")
                finish = "length" if k == ask.sampling.max_tokens - 1 else None
                hear(LegTokens(candidate, [ord("a") + k % 26], finish))

    async def proceed(self, go: Continue) -> None: ...
    async def release(self, lease: str) -> None: ...
    async def renew(self, lease: str) -> bool:
        return True

    def close(self) -> None:
        self.hung_up = True

    async def alive(self) -> bool:
        return True

    async def rejoin(self) -> None: ...

    async def switch(self, role: Role) -> None: ...
    async def drain(self) -> None: ...


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return echo_engine.byte_tokenizer(tmp_path_factory.mktemp("bytes"))


def spec(name: str, kv_blocks: int = 100) -> InstanceSpec:
    role = Role.PREFILL if name.startswith("p") else Role.DECODE
    return InstanceSpec(name=name, role=role, kv_blocks=kv_blocks, capabilities=CAPABILITIES)


def world(policy: Policy | None = None, limits: Limits | None = None) -> LiveWorld:
    started_s = time.monotonic()
    router = Router(policy or Policy(), limits=limits)
    return LiveWorld(router, Alphabet, transfer=TransferSpec(), now=lambda: time.monotonic() - started_s)


def served(
    folder: Path,
    test: Callable[[httpx.AsyncClient, LiveWorld], Awaitable[None]],
    policy: Policy | None = None,
    limits: Limits | None = None,
) -> None:
    async def main() -> None:
        made = world(policy, limits)
        made.instances.join(spec("p"))
        made.instances.join(spec("d"))
        made.open()
        tokenizer = Tokenizer.load(folder)
        engine: Backend = ClusterEngine(made, "tiny", tokenizer.vocab)
        sock = bind("127.0.0.1", 0)
        config = uvicorn.Config(create_app(Service(engine, tokenizer, "tiny", max_requests=None)), log_level="warning", lifespan="off")
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve(sockets=[sock]))
        try:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{sock.getsockname()[1]}", timeout=60) as http:
                await test(http, made)
        finally:
            server.should_exit = True
            await serving
            await made.close()
            sock.close()
        made.check()
        assert not made.requests.by_id

    asyncio.run(main())


def test_a_completion_crosses_the_cluster(folder: Path) -> None:
    async def test(http: httpx.AsyncClient, world: LiveWorld) -> None:
        body = {"model": "tiny", "prompt": "hello", "max_tokens": 6, "temperature": 0}
        answer = (await http.post("/v1/completions", json=body)).raise_for_status().json()
        assert answer["choices"][0]["text"] == "abcdef"
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens"] == 6
        streamed = (await http.post("/v1/completions", json={**body, "stream": True})).raise_for_status().text
        assert streamed.count("data: ") >= 3
        assert streamed.rstrip().endswith("data: [DONE]")
        assert (await http.get("/health")).status_code == 200
        assert "vllm:" in (await http.get("/metrics")).text

    served(folder, test)


def test_a_stop_string_ends_a_request_as_a_success(folder: Path) -> None:
    async def test(http: httpx.AsyncClient, world: LiveWorld) -> None:
        body = {"model": "tiny", "prompt": "hello", "max_tokens": 500, "temperature": 0, "stop": "ghi"}
        answer = (await http.post("/v1/completions", json=body)).raise_for_status().json()
        assert answer["choices"][0]["text"] == "abcdef"
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert not world.requests.by_id
        assert world.timeline(0)["status"] == "done"

    served(folder, test)


@pytest.mark.parametrize("stream", [False, True])
def test_the_router_refuses_what_is_too_much_and_clients_may_come_again(folder: Path, stream: bool) -> None:
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 8, "temperature": 0, "stream": stream}

    async def test(http: httpx.AsyncClient, world: LiveWorld) -> None:
        world.instances.members["p"].remote.halted.clear()  # type: ignore[attr-defined]
        first = [asyncio.create_task(http.post("/v1/completions", json=body)) for _ in range(2)]
        while len(world.requests.by_id) < 2:
            await asyncio.sleep(0.01)
        answer = await http.post("/v1/completions", json=body)
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        error = answer.json()["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "overloaded")
        assert error["message"] == "2 requests are in flight, and no more may be: try again in 1 s"
        assert 'pdlab:router_http_requests_rejected_total{code="429",model_name="tiny"} 1.0' in (await http.get("/metrics")).text
        world.instances.members["p"].remote.halted.set()  # type: ignore[attr-defined]
        assert [(await one).status_code for one in first] == [200, 200]
        assert world.tally.ends["rejected"] == 1
        assert (await http.post("/v1/completions", json=body)).status_code == 200

    served(folder, test, limits=Limits(max_in_flight=2))


def test_whom_the_policy_turns_away_may_come_again(folder: Path) -> None:
    class Busy(Policy):
        def dispatch(self, request: Request, cluster: Cluster) -> Instance | Reject | None:
            return Reject("its TTFT would be 7 s")

    async def test(http: httpx.AsyncClient, world: LiveWorld) -> None:
        answer = await http.post("/v1/completions", json={"model": "tiny", "prompt": "hello"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "overloaded")
        assert "its TTFT would be 7 s" in answer.text

    served(folder, test, Busy())


def test_candidates_are_told_apart(folder: Path) -> None:
    async def test(http: httpx.AsyncClient, world: LiveWorld) -> None:
        body = {"model": "tiny", "prompt": "hello", "max_tokens": 4, "n": 3, "temperature": 1}
        answer = (await http.post("/v1/completions", json=body)).raise_for_status().json()
        assert [choice["text"] for choice in answer["choices"]] == ["abcd"] * 3

    served(folder, test)


def test_a_cluster_without_instances_is_not_ready_and_says_so(folder: Path) -> None:
    async def test(http: httpx.AsyncClient, world: LiveWorld) -> None:
        world.instances.leave("p", 0)
        world.instances.leave("d", 0)
        answer = await http.post("/v1/completions", json={"model": "tiny", "prompt": "hello"})
        assert answer.status_code == 503
        assert "no instance is ready" in answer.text
        world.instances.join(spec("d", 100))
        assert (await http.post("/v1/completions", json={"model": "tiny", "prompt": "x"})).status_code == 503  # the old incarnation
        world.instances.join(InstanceSpec(name="d", role=Role.DECODE, kv_blocks=100, incarnation=1, capabilities=CAPABILITIES))
        assert (await http.post("/v1/completions", json={"model": "tiny", "prompt": "x"})).status_code == 200

    served(folder, test)


def test_the_router_s_refusal_for_want_of_room_is_the_request_s_own_fault() -> None:
    async def main() -> None:
        made = world()
        engine = ClusterEngine(made, "tiny", 300)
        made.instances.join(spec("d0", 10))
        ended = await last(engine.submit(Submit(5, [1] * 600, Sampling(max_tokens=8))))
        assert isinstance(ended, Ended)
        assert (ended.stage, ended.unfit) == (Stage.FAILED, True)
        assert ended.error == "its prompt of 600 tokens needs 38 KV blocks, more than the 10 that d0 has"
        await made.close()
        made.check()

    asyncio.run(main())


async def last(queue: asyncio.Queue[FromQueue]) -> Tokens:
    while True:
        tokens = await queue.get()
        assert isinstance(tokens, Tokens)
        if tokens.finish is not None:
            return tokens


def test_what_is_ready_and_how_loaded_it_is_sums_up_the_instances() -> None:
    async def main() -> None:
        made = world()
        engine = ClusterEngine(made, "tiny", 300, context_tokens=1000)
        assert engine.down == "no instance is ready"
        made.instances.join(spec("p", 100))
        made.instances.join(spec("d", 40))
        assert engine.down is None
        assert (engine.ready.max_tokens, engine.ready.kv_blocks, engine.ready.block_tokens) == (1000, 140, 16)
        for name, waiting in (("p", 3), ("d", 4)):
            made.instances.report(Report(name, waiting=waiting, running=2, used_blocks=10, free_blocks=5))
        load = engine.load.report
        assert (load.waiting, load.running, load.used_blocks, load.free_blocks) == (7, 4, 20, 10)
        made.instances.leave("d", 0)
        assert (engine.load.report.waiting, engine.ready.max_tokens) == (3, 1000)
        await made.close()

    asyncio.run(main())


def test_what_the_largest_instance_holds_bounds_a_request() -> None:
    async def main() -> None:
        made = world()
        engine = ClusterEngine(made, "tiny", 300, context_tokens=2000)
        made.instances.join(spec("p", 100))
        made.instances.join(spec("d", 40))
        assert engine.ready.max_tokens == 1601, "the last token's KV is never written"
        made.instances.leave("p", 0)
        assert engine.ready.max_tokens == 641
        made.instances.join(msgspec.structs.replace(spec("d2", 0), context_tokens=1800))
        assert engine.ready.max_tokens == 1800, "one that does not tell its blocks"
        made.instances.join(msgspec.structs.replace(spec("d3", 0)))
        assert engine.ready.max_tokens == 2000, "nor its context: the model's own"
        await made.close()

    asyncio.run(main())


def test_a_request_goes_to_the_instance_that_can_hold_it_and_is_the_client_s_mistake_where_none_can(folder: Path) -> None:
    async def test(http: httpx.AsyncClient, world: LiveWorld) -> None:
        for name, blocks in (("d0", 10), ("d1", 100)):
            world.instances.join(spec(name, blocks))
        world.instances.leave("d", 0)
        body = {"model": "tiny", "prompt": "x" * 600, "max_tokens": 8}
        for _ in range(4):
            answer = (await http.post("/v1/completions", json=body)).raise_for_status().json()
            assert answer["usage"]["completion_tokens"] == 8
        remotes = {name: member.remote for name, member in world.instances.members.items()}
        assert len(remotes["d1"].asks) == 4 and not remotes["d0"].asks  # type: ignore[attr-defined]
        world.instances.leave("p", 0)
        world.instances.leave("d1", 0)
        answer = await http.post("/v1/completions", json=body)
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "context_length_exceeded"

    served(folder, test)


def test_where_only_one_that_drains_could_hold_it_that_is_a_503_with_the_numbers(folder: Path) -> None:
    async def test(http: httpx.AsyncClient, world: LiveWorld) -> None:
        world.instances.leave("d", 0)
        world.instances.leave("p", 0)
        world.instances.join(spec("d0", 10))
        world.instances.join(msgspec.structs.replace(spec("d1", 100), draining=True))
        answer = await http.post("/v1/completions", json={"model": "tiny", "prompt": "x" * 600, "max_tokens": 8})
        assert answer.status_code == 503, "one that could is draining: it may take work again"
        assert "needs 38 KV blocks, more than the 10 that d0 has" in answer.json()["error"]["message"]

    served(folder, test)


def test_a_router_with_grace_is_down_when_that_has_passed() -> None:
    async def main() -> None:
        made = world()
        made.router.membership.limits = Limits(grace_s=60.0)
        engine = ClusterEngine(made, "tiny", 300)
        assert engine.down is not None, "nobody has been there"
        made.instances.join(spec("p"))
        made.instances.leave("p", 0)
        assert engine.down is None
        made.router.membership.limits = Limits()
        made.tell(Tick())
        assert engine.down == "no instance is ready"
        await made.close()

    asyncio.run(main())


def test_slos_and_the_ids_of_whoever_asks_go_through() -> None:
    async def main() -> None:
        made = world()
        engine = ClusterEngine(made, "tiny", 300)
        made.instances.join(spec("p"))
        made.instances.join(spec("d"))
        labels = {"session": "s", "tenant": "t", "offline": True}
        queue = engine.submit(Submit(77, [1, 2, 3], Sampling(max_tokens=3), ttft_slo_s=0.5, tpot_slo_s=0.25, **labels))  # type: ignore[arg-type]
        asked = made.requests.by_id[0].request
        assert {name: getattr(asked, name) for name in labels} == labels
        assert made.requests.by_id[0].request.ttft_slo_s == 0.5
        assert made.requests.by_id[0].request.tpot_slo_s == 0.25
        ended = await last(queue)
        assert (ended.id, ended.finish) == (77, "length")
        line = engine.timeline(77)
        assert line is not None
        assert (line["status"], line["decode_instance"], line["cached_tokens"]) == ("done", "d", 2)
        assert engine.timeline(78) is None
        engine.cancel(77)
        queue = engine.submit(Submit(78, [1], Sampling(max_tokens=400)))
        engine.cancel(78)
        assert (await last(queue)).finish == "abort"
        await asyncio.sleep(0)
        await made.close()
        made.check()

    asyncio.run(main())


def test_what_failed_says_at_which_stage_and_of_which_request() -> None:
    async def main() -> None:
        made = world()
        engine = ClusterEngine(made, "tiny", 300)
        ended = await last(engine.submit(Submit(5, [1], Sampling())))
        assert isinstance(ended, Ended)
        assert (ended.id, ended.stage, ended.finish, ended.error) == (5, Stage.REJECTED, "error", "no instance is ready")
        made.instances.join(spec("p"))
        made.instances.join(spec("d"))
        remote = made.instances.members["d"].remote
        assert isinstance(remote, Alphabet)
        remote.broken = True
        ended = await last(engine.submit(Submit(6, [1], Sampling(max_tokens=40))))
        assert isinstance(ended, Ended)
        assert (ended.id, ended.stage) == (6, Stage.FAILED)
        assert "gave up after 3 attempts" in ended.error
        await made.close()

    asyncio.run(main())


def test_a_cluster_whose_event_log_has_no_room_left_goes_on(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    head = Head(pdlab="", seed=0, policy="", policy_hash="", hash_tokens=16, experiment={"long": "x" * 10_000})

    async def test(http: httpx.AsyncClient, made: LiveWorld) -> None:
        made.teller.log = log = EventLog(Path("/dev/full"), head, warn=logging.getLogger("test").warning)
        for _ in range(2):
            (await http.post("/v1/completions", json={"model": "tiny", "prompt": "x", "max_tokens": 3})).raise_for_status()
        log.close()
        assert log.dropped > 5

    served(folder, test)
    (said,) = [record.getMessage() for record in caplog.records if "event log" in record.getMessage()]
    assert said.startswith("the event log stopped at") and "No space left on device): /dev/full" in said


def test_the_load_it_tells_is_what_instances_have_reported_last(folder: Path) -> None:
    async def test(http: httpx.AsyncClient, made: LiveWorld) -> None:
        async def told(name: str) -> float:
            page = (await http.get("/metrics")).text
            return sum(float(line.split()[-1]) for line in page.splitlines() if line.startswith(f"vllm:{name}{{"))

        assert await told("num_requests_running") == 0
        for running, blocks in ((3, 20), (1, 10)):
            for name in ("p", "d"):
                made.instances.report(Report(name, 0, time.time(), running=running, waiting=2, used_blocks=blocks))
            assert await told("num_requests_running") == 2 * running
            assert await told("num_requests_waiting") == 4
            assert await told("kv_cache_usage_perc") == pytest.approx(2 * blocks / 100)

    served(folder, test)


@pytest.mark.parametrize(("engine", "status"), [("pdlab", 400), ("vllm", 200)])
def test_a_grammar_is_checked_here_unless_vllm_servers_alone_will_see_it(engine: str, status: int, folder: Path) -> None:
    async def test(http: httpx.AsyncClient, world: LiveWorld) -> None:
        for member in list(world.instances.members.values()):
            world.instances.join(msgspec.structs.replace(member.spec, engine=engine, incarnation=member.spec.incarnation + 1))
        remotes = [member.remote for member in world.instances.members.values()]
        body = {"prompt": "hello", "max_tokens": 3, "temperature": 0, "structured_outputs": {"structural_tag": '{"format": {}}'}}
        assert (await http.post("/v1/completions", json=body)).status_code == status
        asks = [ask for remote in remotes for ask in remote.asks]  # type: ignore[attr-defined]
        assert {ask.sampling.structured.structural_tag for ask in asks} == ({'{"format": {}}'} if status == 200 else set())  # type: ignore[union-attr]

    served(folder, test)
