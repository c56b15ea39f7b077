"""A migration, at its destination: copy the KV of a running request while it goes on at its source, then let it stand still for the rest,
as `Staging` says. If anything fails the request goes on at the source.

And the beginning of a prompt's KV, from an instance that has it cached (`borrow`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import closing
from typing import TypeVar

import msgspec

from pdlab.core.staging import Staging
from pdlab.core.types import UsageError
from pdlab.real.api.backend import Exchanging
from pdlab.real.api.errors import ApiError
from pdlab.real.api.exchange import Directory, SameHost
from pdlab.real.api.legs import Move, check_made, descriptor, kv_lost
from pdlab.real.api.requests import check_tokens
from pdlab.real.engine.messages import FromQueue, Landed, News, Proceed, Receive, Reserved, Source, Staged, Submit
from pdlab.real.net.http import Broken, Garbled, HttpClient
from pdlab.real.net.tls import PLAIN, Tls
from pdlab.real.net.wire import ExportAnswer, ExportBody, FetchedFrom, FetchFrom, KvParams, LendBody
from pdlab.real.transfer.pair import tokens_held

log = logging.getLogger(__name__)
CALL_S, CONNECT_S = 5.0, 2.0
T = TypeVar("T", Reserved, Staged, Landed)

_read_exported = msgspec.json.Decoder(ExportAnswer).decode


class Migrations:
    """What this instance takes over from others, once its caller has looked them up: they are sent `token`, by `tls` where their URL says
    https. Close it when done."""

    def __init__(self, engine: Exchanging, token: str | None = None, directory: Directory | None = None, tls: Tls = PLAIN) -> None:
        self.engine, self.directory, self.tls = engine, directory or SameHost(), tls
        self._token = token or ""
        self._calling_off: set[asyncio.Task[None]] = set()

    async def bring(
        self, move: Move, submit: Submit, arriving: asyncio.Queue[FromQueue], news: asyncio.Queue[News], given: Callable[[list[int]], None]
    ) -> None:
        """Raises ApiError: 503 kv_full, else 409 kv_lost."""
        try:
            with closing(self._source(move.url)) as source:
                async with asyncio.timeout(move.deadline_s):
                    await self._copy(source, move, submit, arriving, news, given)
        except BaseException as error:
            self._call_off(move)
            if isinstance(error, TimeoutError):
                raise kv_lost(f"the migration took more than {move.deadline_s:g} s", "deadline") from None
            raise

    async def borrow(self, fetch: FetchFrom, submit: Submit, arriving: asyncio.Queue[FromQueue]) -> FetchedFrom | None:
        """Read the beginning of a prompt's KV from who may have it cached, and compute the rest; all of it where nothing comes, which is
        told at once where it is known at once."""
        ready, told = self.engine.ready, FetchedFrom()
        wanted = submit.hashes[: min(fetch.tokens, len(submit.tokens) - 1) // ready.block_tokens]
        try:
            await self.directory.check_url(fetch.url)
            with closing(self._source(fetch.url)) as http:
                async with asyncio.timeout(fetch.deadline_s):
                    found = await self._ask(http, b"/pdlab/v1/lend", LendBody(list(wanted), fetch.deadline_s))
            if found.lease:
                source = (await self._found(found, 1))[1]
                self.engine.receive(Receive(submit, [], source, True, fetch.deadline_s, prefix=True), arriving)
                return None
        except (ApiError, TimeoutError) as trouble:
            log.info("the prefix of a prompt does not come from %s: %s", fetch.url, trouble)
            told = FetchedFrom(unreachable=isinstance(trouble, ApiError) and trouble.cause == "unreachable")
        self.engine.submit(submit, arriving)
        return told

    async def close(self) -> None:
        """Waits for the sources that are still to be told."""
        await asyncio.gather(*self._calling_off)

    async def _copy(
        self,
        http: HttpClient,
        move: Move,
        submit: Submit,
        arriving: asyncio.Queue[FromQueue],
        news: asyncio.Queue[News],
        given: Callable[[list[int]], None],
    ) -> None:
        engine, staging = self.engine, Staging(self.engine.ready.block_tokens)
        made, source = await self._export(http, move, submit)
        engine.receive(Receive(submit, made, source, False, move.deadline_s), arriving)
        staging.copy(source.kv_tokens)
        await _next(news, Reserved)
        await _next(news, Staged)
        while not staging.full:
            made, source = await self._export(http, move, submit)
            if staging.stops(source.kv_tokens):
                break
            engine.proceed(Proceed(submit.id, made, source, False))
            staging.copy(source.kv_tokens)
            await _next(news, Staged)
        made, source = await self._export(http, move, submit, stop=True)
        given(made)
        engine.proceed(Proceed(submit.id, made, source))
        await _next(news, Landed)

    async def _export(self, http: HttpClient, move: Move, submit: Submit, *, stop: bool = False) -> tuple[list[int], Source]:
        found = await self._ask(http, b"/pdlab/v1/export", ExportBody(move.leg, stop, lease_s=move.deadline_s))
        return await self._found(found, submit.sampling.max_tokens)

    async def _found(self, found: ExportAnswer, max_tokens: int) -> tuple[list[int], Source]:
        """What a source has answered, checked."""
        await self.directory.check_descriptor(found.descriptor.encode(errors="replace"))
        ready = self.engine.ready
        try:
            blocks = KvParams(remote_block_ids=list(found.block_ids)).block_ids()
            check_tokens(found.made, ready.vocab, "made")
            check_made(found.made, max_tokens, "made")
            at = descriptor(found.descriptor, "descriptor")
        except (ValueError, ApiError) as wrong:
            raise kv_lost(f"the source's answer makes no sense: {wrong}") from None
        if not found.lease or not 0 <= found.kv_tokens <= tokens_held(len(blocks), at, ready.block_tokens):
            raise kv_lost("the source's answer makes no sense: its blocks and tokens do not go together")
        return found.made, Source(at, found.lease, blocks, found.kv_tokens)

    async def _ask(self, http: HttpClient, path: bytes, body: ExportBody | LendBody) -> ExportAnswer:
        try:
            status, raw = await http.call(b"POST", path, msgspec.json.encode(body), CALL_S)
            if status != 200:
                raise kv_lost(f"{http.url} answers {status}: {raw[:200].decode(errors='replace')}")
            return _read_exported(raw)
        except (Garbled, ValueError, RecursionError, msgspec.MsgspecError) as trouble:
            raise kv_lost(f"{http.url}: {trouble or type(trouble).__name__}") from None
        except Broken as trouble:
            raise kv_lost(f"{http.url}: {trouble}", "unreachable") from None

    def _source(self, url: str) -> HttpClient:
        try:
            return HttpClient(url, self._token, tls=self.tls, connect_s=CONNECT_S)
        except UsageError as wrong:
            raise kv_lost(f"{url}: {wrong}") from None

    def _call_off(self, move: Move) -> None:
        """It goes on where it was. Whether or not the source hears it: its lease ends by time."""

        async def tell() -> None:
            try:
                with closing(self._source(move.url)) as source:
                    await self._ask(source, b"/pdlab/v1/export", ExportBody(move.leg, resume=True))
            except ApiError as error:
                log.info("leg %s at %s was not told that it stays: %s", move.leg, move.url, error.message)

        task = asyncio.create_task(tell())
        self._calling_off.add(task)
        task.add_done_callback(self._calling_off.discard)


async def _next(news: asyncio.Queue[News], kind: type[T]) -> T:
    """Full, and an engine's error, end the leg elsewhere, and with it this task."""
    found = await news.get()
    assert isinstance(found, kind), f"{found} where {kind.__name__} was due"
    return found
