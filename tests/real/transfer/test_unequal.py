"""Sides that differ, in ranks, blocks and elements: every token's KV arrives where it belongs, by every way, and nothing else changes."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from pdlab.core.kv_plan import heads_of
from pdlab.real.transfer import nixl
from pdlab.real.transfer.blocks import Blocks, KvPart, converted
from pdlab.real.transfer.descriptor import Geometry, decode
from pdlab.real.transfer.endpoint import KvEndpoint
from pdlab.real.transfer.shared import SEGMENT, shared_kv
from tests.real.transfer import gpu
from tests.real.transfer.peer import LAYERS, Peer, endpoint

E4M3 = torch.float8_e4m3fn
DIM, TOKENS, CACHED = 8, 44, 20


@dataclass
class Shape:
    """One side: `tp` ranks of a model of `heads` KV heads, or of a latent vector (one plane)."""

    tp: int
    block_tokens: int = 4
    dtype: torch.dtype = torch.float32
    heads: int = 4
    planes: int = 2


class Side:
    """Its ranks' memories, and the ids of a sequence's blocks, in no order."""

    def __init__(self, shape: Shape, seed: int, *, shared: bool) -> None:
        self.shape, rng = shape, np.random.default_rng(seed)
        self.count = -(-TOKENS // shape.block_tokens)
        self.ids = rng.permutation(self.count + 3)[: self.count].tolist()
        self.memories = [self._memory(rank, rng, shared) for rank in range(shape.tp)]
        self.endpoints: list[KvEndpoint] = []
        self.descriptor = b""

    def _memory(self, rank: int, rng: np.random.Generator, shared: bool) -> torch.Tensor:
        s = self.shape
        full = (LAYERS, s.planes, self.count + 3, len(heads_of(s.heads, s.tp, rank)), s.block_tokens, DIM)
        kv = shared_kv(full, s.dtype).copy_(torch.from_numpy(rng.standard_normal(full)))
        if not shared:
            setattr(kv, gpu.ALLOCATION, kv.__dict__.pop(SEGMENT))
        return kv

    async def start(self, name: str, transport: str, stack: AsyncExitStack, **more: Any) -> None:
        for rank, kv in enumerate(self.memories):
            own: dict[str, Any] = {"rank": rank, "tp": self.shape.tp, "kv_heads": self.shape.heads, "checksums": True, **more}
            made = endpoint(kv, transport, name=f"{name}.{rank}", block_tokens=self.shape.block_tokens, **own)
            self.endpoints.append(await stack.enter_async_context(made))
        first, *others = (one.descriptor() for one in self.endpoints)
        self.descriptor = msgspec.structs.replace(decode(first), ranks=tuple(others)).encode()

    def hold(self, sequence: torch.Tensor, tokens: range, layers: slice = slice(None)) -> None:
        """What each rank holds of a sequence [layers, planes, tokens, heads, dim], its tokens rounded to elements of this side."""
        for rank, kv in enumerate(self.memories):
            held = list(heads_of(self.shape.heads, self.shape.tp, rank))
            for at in tokens:
                block, slot = self.ids[at // self.shape.block_tokens], at % self.shape.block_tokens
                kv[layers, :, block, :, slot] = sequence[layers, :, at][:, :, held].to(kv.dtype)


PAIRS = [
    (Shape(2), Shape(1)),
    (Shape(1), Shape(2)),
    (Shape(2, heads=2), Shape(4, heads=2)),  # each head at two of them
    (Shape(8, heads=2), Shape(2, heads=2)),  # of the four that have a head one is read
    (Shape(4, heads=1, planes=1), Shape(2, heads=1, planes=1)),  # a latent vector
    (Shape(1, 16), Shape(1, 4)),
    (Shape(2, 4), Shape(1, 8)),
    (Shape(1), Shape(1, dtype=torch.bfloat16)),
    (Shape(1, 8, torch.bfloat16), Shape(2, 4)),
    (Shape(4, 2, torch.float16, heads=1, planes=1), Shape(1, 4, torch.bfloat16, heads=1, planes=1)),
    (Shape(1, dtype=torch.bfloat16), Shape(1, dtype=E4M3)),
    (Shape(1, 8, E4M3), Shape(2, 4)),
    (Shape(2, dtype=E4M3), Shape(1, dtype=E4M3)),
    (Shape(2, 2, torch.float16, heads=1, planes=1), Shape(1, 4, E4M3, heads=1, planes=1)),
]


def named(pair: tuple[Shape, Shape]) -> str:
    return " to ".join(f"{s.tp}x{s.block_tokens} {str(s.dtype)[6:]} {s.heads}h{s.planes}" for s in pair)


def play(pair: tuple[Shape, Shape], way: tuple[str, bool], run: Callable[[Side, Side, torch.Tensor], Any], **more: Any) -> None:
    """With a sequence of which the source holds all."""
    transport, shared = way
    source, target = (Side(shape, seed, shared=shared) for seed, shape in enumerate(pair))
    shape = pair[0]
    sequence = torch.randn((LAYERS, shape.planes, TOKENS, shape.heads, DIM), generator=torch.Generator().manual_seed(7)).to(shape.dtype)
    source.hold(sequence, range(TOKENS))

    async def go() -> None:
        async with AsyncExitStack() as stack:
            await source.start("p", transport, stack, **more)
            await target.start("d", transport, stack, **more)
            await run(source, target, sequence)

    asyncio.run(go())


def alike(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(a, b, strict=True))


def rounded(pair: tuple[Shape, Shape], tokens: range) -> range:
    """To the end of the run that the last of them is in."""
    unit = min(shape.block_tokens for shape in pair)
    return range(tokens.start, min(-(-tokens.stop // unit) * unit, TOKENS))


@pytest.mark.parametrize("pair", PAIRS, ids=named)
def test_each_rank_reads_its_heads_of_those_who_have_them(pair: tuple[Shape, Shape], way: tuple[str, bool]) -> None:
    reads(pair, way)


@pytest.mark.skipif(nixl.api() is None, reason="NIXL is not installed (pip install nixl-cu12)")
@pytest.mark.parametrize("pair", [PAIRS[i] for i in (0, 1, 5, 6, 8, 11)], ids=named)
def test_nixl_reads_them_where_they_lie_too(pair: tuple[Shape, Shape], monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies together is so little here that it would be gathered."""
    monkeypatch.setattr(nixl, "SCATTERED_BYTES", 0)
    reads(pair, ("nixl", False))


def reads(pair: tuple[Shape, Shape], way: tuple[str, bool]) -> None:
    async def run(source: Side, target: Side, sequence: torch.Tensor) -> None:
        read: list[str] = []
        source.endpoints[0]._lease_read = lambda lease, blocks: read.append(lease)
        expected = Side(target.shape, 1, shared=False)
        assert alike(expected.memories, target.memories) and expected.ids == target.ids
        # all but what a cache has, then one layer of another part: a cached prefix ends within a block of the source
        for lease, tokens, layers in (("most", range(CACHED, 39), None), ("a layer", range(4 * 4, TOKENS), (1, 2))):
            for one in source.endpoints:
                one.offer(lease, source.ids)
            release, end = layers is None, {"tokens": tokens, "layers": layers, "deadline_s": 30.0}
            results = await asyncio.gather(
                *(one.pull(source.descriptor, lease, source.ids, target.ids, release=False, **end) for one in target.endpoints)  # type: ignore[arg-type]
            )
            assert [(one.status, one.reason) for one in results] == [("done", "")] * target.shape.tp
            assert source.endpoints[0].holds(lease) and not read
            expected.hold(sequence, rounded(pair, tokens), slice(*(layers or (None, None))))
            assert alike(expected.memories, target.memories)
            if release:
                assert (await target.endpoints[0].pull(source.descriptor, lease, [], [], deadline_s=30.0)).status == "done"
                await asyncio.sleep(0)
                assert read.pop() == lease and not source.endpoints[0].holds(lease)
        assert sum(one.bytes for one in results) == moved_bytes(pair, len(range(16, TOKENS)), layers=1)

    play(pair, way, run)


def moved_bytes(pair: tuple[Shape, Shape], tokens: int, layers: int) -> int:
    """Copies of heads counted, in the source's elements."""
    source, target = pair
    heads = sum(len(heads_of(target.heads, target.tp, rank)) for rank in range(target.tp))
    return tokens * layers * source.planes * heads * DIM * source.dtype.itemsize


@pytest.mark.parametrize("pair", PAIRS, ids=named)
def test_each_rank_writes_to_those_who_hold_its_heads(pair: tuple[Shape, Shape], way: tuple[str, bool]) -> None:
    """By chunk, each in two groups of layers, all parts under way at once; the target has cached the beginning."""

    async def run(source: Side, target: Side, sequence: torch.Tensor) -> None:
        a, b = (shape.block_tokens for shape in pair)
        cached = CACHED // b * b
        expected = Side(target.shape, 1, shared=False)
        arriving = [one.expect("t", target.ids[cached // b :], tokens=TOKENS - cached, deadline_s=30) for one in target.endpoints]
        cut = (cached + 12) // a * a
        parts = [
            one.push(target.descriptor, "t", source.ids, target.ids, tokens=tokens, layers=layers, deadline_s=30)
            for one in source.endpoints
            for tokens in (range(cached, cut), range(cut, TOKENS))
            for layers in ((0, 1), (1, LAYERS))
        ]
        assert {(one.status, one.reason) for one in await asyncio.gather(*parts)} == {("done", "")}
        came = await asyncio.gather(*arriving)
        assert [(one.status, one.reason) for one in came] == [("done", "")] * target.shape.tp
        assert sum(one.bytes for one in came) == moved_bytes(pair, len(rounded(pair, range(cached, TOKENS))), LAYERS)
        expected.hold(sequence, range(cached, TOKENS))
        assert alike(expected.memories, target.memories)

    play(pair, way, run)


@pytest.mark.parametrize("pair", [PAIRS[4], PAIRS[6], PAIRS[8], PAIRS[11]], ids=named)
def test_a_device_packs_and_unpacks_the_same(pair: tuple[Shape, Shape]) -> None:
    """As an accelerator's memory is read, by torch's own indexing."""
    for shape in pair:
        side = Side(shape, 1, shared=False)
        for kv in side.memories:
            on_cpu, device = Blocks(kv), Blocks(kv.clone())
            device.on_cpu = False
            unit = shape.block_tokens // 2
            part = KvPart(np.array([5, 2, 6], np.int32), unit, range(kv.shape[3] // 2, kv.shape[3]), (1, 3))
            buffer = torch.zeros(3 * on_cpu.run_bytes(part), dtype=torch.uint8)
            on_cpu.pack(part, buffer.data_ptr())
            assert torch.equal(Blocks._gathered(kv, part).contiguous().view(torch.uint8).flatten(), buffer)
            other = torch.randn(kv.shape).to(kv.dtype)
            into, again = Blocks(other.clone()), Blocks(other.clone())
            into.unpack(buffer.data_ptr(), part)
            again._scatter(Blocks._gathered(kv, part), part)
            assert torch.equal(into.kv, again.kv) and not torch.equal(into.kv, other)


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16, E4M3])
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16, torch.float16, E4M3])
def test_elements_are_rounded_as_torch_rounds_them(source: torch.dtype, target: torch.dtype) -> None:
    """Whatever the bits: ties, denormals, infinities, and what is no number."""
    bits = torch.randint(0, 256, (40_000 * source.itemsize,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    bits[: 8 * source.itemsize] = (
        torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1.00390625, 1.01171875, 3.4e38]).to(source).view(torch.uint8)
    )
    values = bits.view(source)
    found = converted(values.data_ptr(), len(values), source, target)
    wide = values.float()
    expected = (wide.clamp(-448.0, 448.0) if target == E4M3 else wide).to(target).float()
    assert torch.equal(found.float().nan_to_num(7.0), expected.nan_to_num(7.0)) and torch.equal(found.isnan(), wide.isnan())


def test_a_ticket_whose_rank_has_gone_fails_though_others_pushed_theirs() -> None:
    async def run(source: Side, target: Side, sequence: torch.Tensor) -> None:
        arriving = target.endpoints[0].expect("t", target.ids, deadline_s=30)
        assert (await source.endpoints[0].push(target.descriptor, "t", source.ids, target.ids, deadline_s=30)).status == "done"
        assert not arriving.done()
        broken = asyncio.ensure_future(
            source.endpoints[1].push(target.descriptor, "t", source.ids, target.ids, layers=(0, 1), deadline_s=30)
        )
        assert (await broken).status == "done"
        await source.endpoints[1].close()
        result = await arriving
        assert result.status == "failed" and result.reason == "p.1 has gone"

    play((Shape(2), Shape(1)), ("tcp", False), run)


def test_a_rank_of_the_reader_that_dies_ends_what_is_written_to_it(mortal: Peer) -> None:
    """The other's part too, and the source is told in time: its blocks are its own again, its lease goes on."""

    async def run(source: Side, target: Side, sequence: torch.Tensor) -> None:
        own = {"block_tokens": 4, "rank": 1, "tp": 2, "kv_heads": 4, "checksums": True}
        far = mortal.make("d.1", "tcp", blocks=target.count + 3, seed=1, dtype="float32", shared=False, **own)
        near = msgspec.structs.replace(decode(target.endpoints[0].descriptor()), tp=2, ranks=(far,))
        near = msgspec.structs.replace(near, geometry=decode(far).geometry)
        lone, four = source.endpoints[0], decode(source.descriptor)
        assert four.geometry == near.geometry
        lone.offer("kept", source.ids)
        mortal.ask("expect", name="d.1", ticket="t", blocks=target.ids, deadline_s=30)
        arriving = target.endpoints[0].expect("t", target.ids, deadline_s=30)
        mortal.signal(signal.SIGSTOP)
        push = asyncio.ensure_future(lone.push(near.encode(), "t", source.ids, target.ids, deadline_s=30))
        assert (await arriving).status == "done"
        mortal.signal(signal.SIGKILL)
        result = await push
        assert result.status == "failed" and "d.1" in result.reason
        assert lone.holds("kept")

    play((Shape(1), Shape(2)), ("tcp", False), run)


def test_what_is_converted_is_said_once_and_what_cannot_be_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    async def run(source: Side, target: Side, sequence: torch.Tensor) -> None:
        source.endpoints[0].offer("l", source.ids)
        for _ in range(2):
            end: dict[str, Any] = {"deadline_s": 30, "release": False}
            assert (
                await target.endpoints[0].pull(source.descriptor, "l", source.ids, target.ids, tokens=range(TOKENS), **end)
            ).status == "done"
        here, there = decode(target.endpoints[0].descriptor()), decode(source.descriptor)

        def refusal(**changed: Any) -> str | None:
            geometry: Geometry = msgspec.structs.replace(there.geometry, **changed)
            return target.endpoints[0].refusal(msgspec.structs.replace(there, geometry=geometry).encode())

        assert here.geometry != there.geometry and refusal() is None
        assert refusal(block_tokens=6) == (
            "KV does not fit: block_tokens 8 at d.0 and 6 at p.0: one must be a multiple of the other (dtype would be converted)"
        )
        assert refusal(dtype="int8") == (
            "KV does not fit: dtype 'bfloat16' at d.0 and 'int8' at p.0: int8 is unknown (block_tokens would be converted)"
        )
        assert refusal(kv_heads=3) == ("KV does not fit: kv_heads 4 at d.0 and 3 at p.0 (dtype, block_tokens would be converted)")

    with caplog.at_level(logging.INFO, logger="pdlab.real.transfer.endpoint"):
        play((Shape(1, 4), Shape(1, 8, torch.bfloat16)), ("tcp", False), run)
    said = [record.getMessage() for record in caplog.records if "converted" in record.getMessage()]
    assert said == ["KV from p.0 is converted as it comes to d.0: float32 to bfloat16, blocks of 4 tokens to blocks of 8"]
