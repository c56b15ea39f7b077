"""Step times of a running server, read off its streams, and the overheads of our own.

With r what a request costs besides steps, and one request at a time: a prompt of n tokens has its first token after r + T(n), and the
tokens of a short one follow D(1) apart. A prompt of one token is such a step, so r = TTFT(1) - D(1), and T(n) = TTFT(n) - r; a prompt that
begins with what was asked before gives T(n, cached). At a concurrency b, all of the same length and begun at once, the tokens come D(b)
apart while all decode. What several prompts or a mixed step cost is not seen: the fit puts it together from these.
"""

from __future__ import annotations

import asyncio
import re
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from pdlab.core.types import UsageError
from pdlab.cost.profile import Overheads, Point
from pdlab.proof.calibrate.grid import Bounds, held_out, knots
from pdlab.proof.calibrate.stream import Heard, MeasuredServer
from pdlab.real.host import processes
from pdlab.real.host.processes import MODULE
from pdlab.real.net.http import Broken, HttpClient

OUTPUT_TOKENS = 12
SHORT = 16
REPEATS = 9
SEEN = ("prefill", "cached", "decode")


def points(bounds: Bounds, block_tokens: int = 1) -> list[Point]:
    """What can be seen of the grid, each with room for the tokens that are asked for. Only whole blocks are found in a cache: what is
    cached beyond them would be computed, and taken for what the cached ones cost."""
    found = [*knots(bounds), *held_out(bounds)]
    whole = [p.model_copy(update={"cached": p.cached // block_tokens * block_tokens}) if p.cached else p for p in found]
    kinds = {p: before.kind for p, before in zip(whole, found, strict=True)}
    return [p for p, kind in kinds.items() if p.kind == kind and kind in SEEN and bounds.holds(p, spare=2 * OUTPUT_TOKENS)]


async def request_s(server: MeasuredServer, repeats: int = REPEATS) -> float:
    """r: what a request costs besides steps."""
    heard = [await server.ask(server.prompt(1), OUTPUT_TOKENS) for _ in range(repeats + 2)][2:]
    return max(0.0, median([h.ttft_s for h in heard]) - median([h.gap_s for h in heard]))


async def seconds(server: MeasuredServer, point: Point, besides_s: float) -> float:
    """One repeat of a point, less `besides_s` where it is a prefill."""
    if point.kind == "decode":
        return max(1e-6, await _together(server, point))  # of a tiny model all tokens may come at once
    prompt = server.prompt(point.cached + point.tokens)
    if point.cached:
        await server.ask(prompt[: point.cached], 2)
    heard = await server.ask(prompt, 2)
    return max(1e-6, heard.ttft_s - besides_s)


async def _together(server: MeasuredServer, point: Point) -> float:
    """The gap while all of them decode."""
    length = max(1, point.context - OUTPUT_TOKENS)
    output = 2 * OUTPUT_TOKENS
    heard = await asyncio.gather(*(server.ask(server.prompt(length), output) for _ in range(point.batch)))
    return gap_s(heard)


def gap_s(heard: Sequence[Heard]) -> float:
    """Between the last one's first token and the first one's last, a mean each, since several tokens may come at once; where they are
    hardly all there, of all that there is."""
    begin_s, end_s = max(h.tokens_s[0] for h in heard), min(h.tokens_s[-1] for h in heard)
    means = []
    for h in heard:
        inside = [at for at in h.tokens_s if begin_s <= at <= end_s]
        if len(inside) > OUTPUT_TOKENS // 2:
            means.append((inside[-1] - inside[0]) / (len(inside) - 1))
    return median(means or [h.gap_s for h in heard])


def median(values: list[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2]


# ------------------------------------------------------------ our own server


async def overheads(server: MeasuredServer, decode_s: Callable[[int, int], float], batch: int, repeats: int = REPEATS) -> Overheads:
    """Of a server whose engine's decode steps are known, by batch and contexts in all. What telling a token costs is how much more the
    steps of `batch` sequences take, against those of one, than the fit says; where noise hides it, nothing."""
    request = await request_s(server, repeats)
    if batch < 2:
        return Overheads(request_s=request)
    context = SHORT + OUTPUT_TOKENS
    one, many = Point(batch=1, context=context), Point(batch=batch, context=context)
    expected = decode_s(batch, batch * context) / decode_s(1, context)
    more: list[float] = []
    for _ in range(repeats):
        few_s, many_s = await _together(server, one), await _together(server, many)
        more.append((many_s - expected * few_s) / (batch - 1))
    token = median(more)
    spread = median([abs(value - token) for value in more])
    return Overheads(request_s=request, token_s=token if token > 3 * spread else 0.0)


@asynccontextmanager
async def served(options: list[str]) -> AsyncIterator[str]:
    """`pdlab serve` with these options on a free port, as a process of its own; its URL."""
    command = [*MODULE, "pdlab", "serve", "--port", "0", *options]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    try:
        said = b""
        deadline_s = time.monotonic() + 300
        while not (found := re.search(rb"ready after .*: (http://\S+)/v1", said)):
            part = await asyncio.wait_for(process.stdout.read(4096), deadline_s - time.monotonic())
            if not part:
                raise UsageError(f"the server did not start: {said.decode(errors='replace').strip()[-300:]}")
            said += part
        drained = asyncio.create_task(_drain(process.stdout))
        try:
            yield found[1].decode()
        finally:
            drained.cancel()
            await asyncio.gather(drained, return_exceptions=True)
    finally:
        if process.returncode is None:
            process.terminate()
        await processes.ended(process, 10.0)


@asynccontextmanager
async def all_served(options: list[str], number: int) -> AsyncIterator[list[str]]:
    """So many of them, started at the same time."""
    async with AsyncExitStack() as stack:
        starting = (stack.enter_async_context(served(options)) for _ in range(number))
        urls = []
        for started in await asyncio.gather(*starting, return_exceptions=True):  # all that are there are on the stack then
            if isinstance(started, BaseException):
                raise started
            urls.append(started)
        yield urls


async def _drain(stream: asyncio.StreamReader) -> None:
    while await stream.read(1 << 16):
        pass


async def kv_blocks(http: HttpClient) -> tuple[int, int]:
    """(blocks, tokens of each) as /metrics tells, in vLLM's words; (0, 16) where it does not."""
    try:
        _, page = await http.call(b"GET", b"/metrics")
    except Broken:
        return 0, 16
    line = next((line for line in page.decode(errors="replace").splitlines() if line.startswith("vllm:cache_config_info")), "")
    told = dict(re.findall(r'(\w+)="([^"]*)"', line))
    blocks, size = told.get("num_gpu_blocks", ""), told.get("block_size", "")
    return (int(blocks), int(size)) if blocks.isdigit() and size.isdigit() else (0, 16)
