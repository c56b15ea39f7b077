"""A prefill instance hands over to a decode instance of other ranks, blocks or elements, and back: the tokens are those of one alone."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
from torch import Tensor
from transformers import PreTrainedModel

from pdlab.experiment.experiment import Experiment
from pdlab.real.engine.messages import Export, Landed, Missed, Proceed, Push, Receive, Reserved, Sampling, Source, Staged
from pdlab.real.engine.options import EngineOptions
from pdlab.real.engine.runner import Piece
from pdlab.real.models.attention import AttentionPass, Cache, Stored
from pdlab.real.models.inputs import Inputs
from pdlab.real.transfer.endpoint import KvEndpoint
from pdlab.sim import build
from tests.real.instance.test_kv_service import held, prompts, source
from tests.real.live.test_same_tokens import WAYS
from tests.support import tiny_models
from tests.support.engine_nodes import BLOCK, Node, node, submit, until
from tests.support.small_world import workload

Tiny = Callable[[str], tuple[Path, PreTrainedModel]]
GREEDY = Sampling(max_tokens=6, temperature=0.0)
Side = dict[str, Any]
SIDES: list[tuple[str, Side, Side]] = [
    ("llama", {"tp": 2}, {"tp": 1}),  # two KV heads
    ("llama", {"tp": 1}, {"tp": 2}),
    ("llama", {"tp": 2}, {"tp": 4}),  # each head at two ranks
    ("deepseek-v3", {"tp": 2}, {"tp": 1}),  # a latent vector at each rank
    ("deepseek-v3", {"tp": 1}, {"tp": 2}),
    ("deepseek-v3", {"tp": 2}, {"tp": 4}),
    ("llama", {"block_tokens": 8}, {"block_tokens": 4}),
    ("llama", {"block_tokens": 4}, {"block_tokens": 8}),
    ("deepseek-v3", {"tp": 2, "block_tokens": 8}, {"block_tokens": 4}),
    ("llama", {"kv_cache_dtype": "fp8"}, {"kv_cache_dtype": "fp8"}),
    ("deepseek-v3", {"tp": 2, "kv_cache_dtype": "fp8"}, {"kv_cache_dtype": "fp8"}),
]


def named(case: object) -> str:
    return case if isinstance(case, str) else ",".join(f"{key}={value}" for key, value in dict(case).items())  # type: ignore[call-overload]


@pytest.fixture
def start(tiny: Tiny) -> Iterator[Callable[..., Node]]:
    with ExitStack() as stack:

        def started(name: str, family: str, transport: str = "auto", **own: object) -> Node:
            options = EngineOptions(
                model=str(tiny(family)[0]), block_tokens=BLOCK, kv_blocks=300, max_batch_tokens=48, threads=1, kv_name="x"
            )
            return stack.enter_context(node(name, msgspec.structs.replace(options, **own), transport=transport))

        yield started


def block_of(side: Side) -> int:
    return int(side.get("block_tokens", BLOCK))


def alone(start: Callable[..., Node], family: str, kv: str) -> Callable[[list[int], int], list[int]]:
    """What one instance makes of a prompt that keeps KV so."""
    one = start("alone", family, kv_cache_dtype=kv)

    def of(prompt: list[int], tokens: int) -> list[int]:
        id = 1000 + len(one.outputs)
        one.tell(submit(id, prompt, msgspec.structs.replace(GREEDY, max_tokens=tokens)))
        until(lambda: one.finish(id), one)
        return one.tokens(id)

    return of


def hand_over(id: int, prompt: list[int], how: str, p: Node, d: Node, a: int = BLOCK, b: int = BLOCK) -> None:
    """By a push. `a` and `b`: tokens of a block at either side."""
    d.tell(Receive(submit(id, prompt, GREEDY, block=b), last=False))
    place = until(lambda: d.news(Reserved, id) or None, d)[0]
    push = Push(d.descriptor, place.ticket, place.blocks, place.cached_tokens, how)
    p.tell(msgspec.structs.replace(submit(id, prompt, GREEDY, decodes_here=False, block=a), push=push))
    until(lambda: p.finish(id), p, d)
    d.tell(Proceed(id, p.tokens(id)))


def simulated_bytes(model: Path, prompt_tokens: int, p_tp: int, d_tp: int) -> float:
    """Of a hand-off between such sides."""
    rows = [{"role": role, "count": 1, "hardware": "l4", "tp": tp} for role, tp in (("prefill", p_tp), ("decode", d_tp))]
    asked = {
        "model": str(model),
        "dtype": "float32",
        "workload": {"source": "synthetic", "requests": 1, "rate": 1.0, "prompt": 1, "output": 2},
        "cluster": {"instances": rows},
        "transfer": WAYS["push by layer"],
    }
    world = build.world(Experiment.parse(asked), workload([0.0], prompt_tokens, 3))
    world.run()
    return float(world.records.frame().iloc[0].transfer_bytes)


class Late:
    """A rank that writes each layer's KV after the others have."""

    def __init__(self, attention: AttentionPass) -> None:
        self.attention = attention

    def __call__(self, x: Tensor, inputs: Inputs, cache: Cache, stored: Stored | None) -> Tensor:
        time.sleep(0.02)
        return self.attention(x, inputs, cache, stored)


@pytest.mark.parametrize(("family", "p_side", "d_side"), SIDES, ids=named)
def test_hand_offs_and_migrations_between_unequal_sides(
    family: str, p_side: Side, d_side: Side, start: Callable[..., Node], tiny: Tiny
) -> None:
    """Prompts that share prefixes, which either side caches: by pull, by each push, and one that comes back while it runs."""
    p, d = start("p", family, **p_side), start("d", family, **d_side)
    a, b = block_of(p_side), block_of(d_side)
    kv = d_side.get("kv_cache_dtype")
    made = partial(tiny_models.greedy, tiny(family)[1]) if kv is None else alone(start, family, kv)
    expected = [made(prompt, GREEDY.max_tokens) for prompt in prompts(6)]
    id, crowded = 0, 4 in (p_side.get("tp"), d_side.get("tp"))
    for how in ("pull", "layer") if crowded else ("pull", "request", "chunk", "layer"):
        for prompt, tokens in list(zip(prompts(6), expected, strict=True))[3 if crowded else 0 :]:
            id += 1
            if how == "pull":
                p.tell(submit(id, prompt, GREEDY, decodes_here=False, block=a))
                d.tell(Receive(submit(id, prompt, GREEDY, block=b), [tokens[0]], source(p, held(p, id))))
            else:
                hand_over(id, prompt, how, p, d, a, b)
            until(lambda id=id: d.finish(id), p, d)  # type: ignore[misc]
            assert p.tokens(id) + d.tokens(id) == tokens, how
    assert any(place.cached_tokens for each in range(id) for place in d.news(Reserved, each + 1))

    back, prompt = 100, prompts(6)[5]
    sampling = msgspec.structs.replace(GREEDY, max_tokens=24)
    d.engine.step_limit = 1
    d.tell(submit(back, prompt, sampling, block=b))
    until(lambda: len(d.tokens(back)) > 6, d)
    d.tell(Export(0, back))
    said = until(lambda: d.exported(0), d)
    p.tell(Receive(submit(back, prompt, sampling, block=a), said.made, source(d, said), last=False))
    until(lambda: p.news(Staged, back) or None, p)  # d stands: it could be at its end before a slow read is
    until(lambda: len(d.tokens(back)) > 10, d)
    d.tell(Export(1, back, stop=True))
    said = until(lambda: d.exported(1), p, d)
    p.tell(Proceed(back, said.made, source(d, said)))
    until(lambda: p.finish(back) and d.finish(back), p, d)
    assert (d.finish(back), p.finish(back)) == ("moved", "length")
    assert d.tokens(back) + p.tokens(back) == made(prompt, 24)
    until(lambda: not (p.kv_service.lending.lent or d.kv_service.lending.lent or p.kv_service.lending.pushes.live), p, d)
    p.at_rest()
    d.at_rest()


@pytest.mark.parametrize(("p_side", "d_side"), [({"tp": 2}, {}), ({}, {"tp": 2}), ({"tp": 2}, {"tp": 4})], ids=named)
def test_each_rank_pushes_each_layer_during_the_pass_when_all_have_written_it(
    p_side: dict[str, int], d_side: dict[str, int], start: Callable[..., Node], tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own heads of it, though one rank is behind; as many bytes as the simulator counts."""
    p, d = start("p", "llama", **p_side), start("d", "llama", **d_side)
    for runner in p.followers:
        for layer in runner.model.layers:
            layer.attention = Late(layer.attention)
    pushed: list[tuple[int, Any]] = []
    push, pushes = KvEndpoint.push, p.kv_service.lending.pushes

    def counted(self: KvEndpoint, *args: Any, layers: Any = None, **more: Any) -> Any:
        pushed.append((self._rank, layers))
        return push(self, *args, layers=layers, **more)

    monkeypatch.setattr(KvEndpoint, "push", counted)
    before, ends = list[int](), pushes.ends
    monkeypatch.setattr(pushes, "ends", lambda chunks: (before.append(pushes.live[0].layers), ends(chunks)))
    prompt = [random.Random(3).randrange(300) for _ in range(10 * BLOCK)]  # of one pass
    hand_over(0, prompt, "layer", p, d)
    until(lambda: d.finish(0), p, d)
    assert p.tokens(0) + d.tokens(0) == tiny_models.greedy(tiny("llama")[1], prompt, GREEDY.max_tokens)
    assert before == [2], "of three layers, two were on their way"
    ranks = range(p_side.get("tp", 1))
    assert sorted(pushed) == [(rank, (layer, layer + 1)) for rank in ranks for layer in range(3)]
    assert d.news(Landed, 0)[0].bytes == simulated_bytes(tiny("llama")[0], len(prompt), p_side.get("tp", 1), d_side.get("tp", 1))
    until(lambda: not pushes.live, p, d)
    p.at_rest()
    d.at_rest()


@pytest.mark.parametrize("transport", ["tcp", "shm"])
@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("bfloat16", "float32")], ids=" to ".join)
def test_a_reader_of_another_dtype_converts_what_it_reads(dtypes: tuple[str, str], transport: str, start: Callable[..., Node]) -> None:
    """It decodes, and the KV is the source's within the rounding of bfloat16."""
    p, d = (start(name, "llama", transport, dtype=dtype) for name, dtype in zip("pd", dtypes, strict=True))
    prompt = prompts(6)[4]
    p.tell(submit(0, prompt, GREEDY, decodes_here=False))
    lease = held(p, 0)
    d.tell(Receive(submit(0, prompt, GREEDY), p.tokens(0), source(p, lease)))
    until(lambda: d.finish(0), p, d)
    assert d.finish(0) == "length" and len(d.tokens(0)) == GREEDY.max_tokens - 1
    landed = d.news(Landed, 0)[0]
    here, there = d.engine.runner.kv, p.engine.runner.kv
    assert landed.bytes == len(lease.blocks) * there[:, :, 0].numel() * there.element_size()
    full = len(prompt) // BLOCK
    ours = here[:, :, : len(here[0, 0])].float()
    found = [int((ours - there[:, :, block].float()[:, :, None]).abs().amax((0, 1, 3, 4, 5)).argmin()) for block in lease.blocks[:full]]
    assert len(set(found)) == full
    for ours_at, block in zip(found, lease.blocks[:full], strict=True):
        assert (here[:, :, ours_at].float() - there[:, :, block].float()).abs().max() <= there[:, :, block].float().abs().max() / 128
    until(lambda: not p.kv_service.lending.lent, p, d)
    p.at_rest()
    d.at_rest()


@pytest.mark.parametrize(("family", "transport"), [("llama", "shm"), ("llama", "tcp"), ("deepseek-v3", "tcp")])
@pytest.mark.parametrize("kinds", [("bfloat16", "fp8"), ("fp8", "bfloat16"), ("fp8", "auto")], ids=" to ".join)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kv_of_another_dtype_is_rounded_once_or_not_at_all(
    kinds: tuple[str, str], dtype: str, family: str, transport: str, start: Callable[..., Node]
) -> None:
    """The reader has the source's KV, bit for bit as torch rounds it, and decodes as an instance that was given just that."""
    p, d, same = (
        start(name, family, transport, dtype=dtype, kv_cache_dtype=kv) for name, kv in (("p", kinds[0]), *((n, kinds[1]) for n in "ds"))
    )
    prompt = prompts(6)[4]
    p.tell(submit(0, prompt, GREEDY, decodes_here=False))
    lease = held(p, 0)
    sent = p.engine.runner.kv[:, :, lease.blocks].float()
    d.tell(Receive(submit(0, prompt, GREEDY), p.tokens(0), source(p, lease)))
    until(lambda: d.finish(0), p, d)
    assert d.news(Landed, 0)[0].bytes == sent.numel() * p.engine.runner.kv.element_size()
    kept = sent.to(d.engine.runner.kv.dtype).float()
    full = len(prompt) // BLOCK
    here = d.engine.runner.kv.float()
    for block in range(full):
        assert (here == kept[:, :, block, None]).all(-1).all(-1).all(-1).all(0).all(0).any(), "somewhere"
    runner = same.engine.runner
    runner.kv[:, :, : len(lease.blocks)] = kept.to(runner.kv.dtype)
    made = list(p.tokens(0))
    while len(made) < GREEDY.max_tokens:
        at = len(prompt) + len(made) - 1
        made.append(int(runner.run([Piece(made[-1:], at, range(at // BLOCK + 1), True)])[0].argmax()))
    assert p.tokens(0) + d.tokens(0) == made
    until(lambda: not p.kv_service.lending.lent, p, d)
    p.at_rest()
    d.at_rest()


def test_what_a_rank_of_a_source_does_not_give_is_missed_and_the_rest_is_freed(start: Callable[..., Node]) -> None:
    """One of two ranks has gone: nothing decodes on half of the heads, and the lease is another reader's."""
    p, d = start("p", "llama", "tcp", tp=2), start("d", "llama", "tcp")
    prompt = prompts(6)[4]
    p.tell(submit(0, prompt, GREEDY, decodes_here=False))
    lease = held(p, 0)
    other = start("q", "llama", "tcp", tp=2)
    broken = source(p, lease)
    ranks = msgspec.json.decode(broken.descriptor)
    ranks["ranks"] = msgspec.json.decode(other.descriptor)["ranks"]  # a rank that knows no such lease
    d.tell(Receive(submit(0, prompt, GREEDY), [], Source(msgspec.json.encode(ranks), lease.lease, lease.blocks, lease.kv_tokens)))
    until(lambda: d.finish(0), p, d)
    assert d.finish(0) == "error" and d.news(Missed, 0)
    until(lambda: not d.kv_service.receiving.inbound, d)
    d.at_rest()
    assert p.kv_service.endpoint.holds(lease.lease)
    d.tell(Receive(submit(1, prompt, GREEDY), [], source(p, lease)))
    until(lambda: d.finish(1), p, d)
    assert d.finish(1) == "length"
    until(lambda: not p.kv_service.lending.lent, p, d)
    p.at_rest()
