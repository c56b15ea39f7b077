"""/pdlab/v1: what routers and other instances ask of this one. `app.state.member` is its Member, once it has joined."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from pdlab.core.types import Role
from pdlab.real.api.app import Route, as_json, read
from pdlab.real.api.backend import Exchanging
from pdlab.real.api.errors import ApiError, bad, loading
from pdlab.real.api.exchange import Directory
from pdlab.real.api.generate import Generation
from pdlab.real.api.legs import PARAM, Reserve, bounded, check_made, seconds, source_of
from pdlab.real.api.parse import parse
from pdlab.real.api.requests import check_tokens
from pdlab.real.api.service import Service
from pdlab.real.instance.engine_client import load_report
from pdlab.real.instance.member import Member
from pdlab.real.instance.relay import relayed
from pdlab.real.net.wire import MOST_IDS, About, Continue, ExportAnswer, ExportBody, LeaseBody, LendBody, Rejoin, RoleChange

CONTINUE, RELEASE, EXPORT = msgspec.json.Decoder(Continue), msgspec.json.Decoder(LeaseBody), msgspec.json.Decoder(ExportBody)
LEND = msgspec.json.Decoder(LendBody)
ROLE_CHANGE, REJOIN = msgspec.json.Decoder(RoleChange), msgspec.json.Decoder(Rejoin)


async def _instance(service: Service, request: Request) -> Response:
    member, engine = _member(request), service.engine
    return as_json(
        About(
            engine_id=engine.ready.engine_id,
            state=member.state,
            spec=msgspec.Raw(msgspec.json.encode(member.spec)),
            in_flight=service.in_flight,
            leaked_blocks=engine.load.leaked_blocks,
        )
    )


async def _report(service: Service, request: Request) -> Response:
    """Without the prefix cache's changes, which go to the registry: they can be told once only."""
    spec = _member(request).spec
    return as_json(load_report(service.engine.load, spec.name, spec.incarnation))


async def _continue(service: Service, request: Request) -> Response:
    body = parse(await read(request), CONTINUE)
    generation = _leg(service, body.leg)
    if not isinstance(generation.leg, Reserve) or not generation.waits:
        raise ApiError(404, f"leg {body.leg[:80]!r} does not wait to be continued", param="leg", code="leg_unknown")
    check_tokens(body.made, service.engine.ready.vocab, "made")
    check_made(body.made, generation.ask.sampling.max_tokens, "made")
    if body.made and generation.sole_id is None:
        raise bad("made belongs to one candidate, and this leg has several", "made")
    if body.made[: generation.given] != generation.leg.made:
        raise bad("made does not begin with what the leg was given", "made")
    source = None
    if (params := body.kv_transfer_params) is not None:
        if params.remote_engine_id and params.remote_engine_id == service.engine.ready.engine_id:
            raise bad(f"{PARAM}: the KV lies here already; send it as a decode leg", PARAM)
        source = source_of(params, service.engine.ready)
        if source is None:
            raise bad(f"{PARAM} needs remote_block_ids, remote_request_id and pdlab.descriptor", PARAM)
        await _directory(service).check_descriptor(source.descriptor)
        if not generation.waits:  # it has ended meanwhile
            raise ApiError(404, f"leg {body.leg[:80]!r} does not wait to be continued", param="leg", code="leg_unknown")
    generation.proceed(body.made, source)
    return as_json({})


async def _release(service: Service, request: Request) -> Response:
    body = parse(await read(request), RELEASE)
    _exchanging(service).release(bounded(body.lease, "lease"))
    return as_json({})


async def _renew(service: Service, request: Request) -> Response:
    body = parse(await read(request), RELEASE)
    engine, lease, lease_s = _exchanging(service), bounded(body.lease, "lease"), seconds(body.lease_s, "lease_s")
    engine.renew(lease, lease_s)
    if not await engine.leased(lease):
        raise ApiError(404, f"lease {lease[:80]!r} has ended, or never was", param="lease", code="lease_unknown")
    return as_json({})


async def _export(service: Service, request: Request) -> Response:
    body = parse(await read(request), EXPORT)
    if body.stop and body.resume:
        raise bad("stop and resume exclude each other", "resume")
    lease_s = seconds(body.lease_s, "lease_s")
    engine, id = _exchanging(service), _leg(service, body.leg).sole_id
    if id is None:
        raise bad("this leg has several candidates, and cannot be moved", "leg")
    found = await engine.export(id, body.stop, body.resume, lease_s)
    if found.error:
        raise ApiError(404, f"leg {body.leg[:80]!r}: {found.error}", param="leg", code="leg_unknown")
    if body.resume:
        return as_json(ExportAnswer())
    return as_json(ExportAnswer(found.lease, engine.ready.descriptor.decode(), found.blocks, found.kv_tokens, found.made))


async def _lend(service: Service, request: Request) -> Response:
    body = parse(await read(request), LEND)
    lease_s = seconds(body.lease_s, "lease_s")
    if not 0 < len(body.hashes) <= MOST_IDS:
        raise bad(f"hashes has {len(body.hashes)} entries, it must have 1 to {MOST_IDS}", "hashes")
    engine = _exchanging(service)
    found = await engine.lend(tuple(body.hashes), lease_s)
    if found.error:
        raise ApiError(503, found.error, code="engine_down")
    return as_json(ExportAnswer(found.lease, engine.ready.descriptor.decode(), found.blocks, found.kv_tokens))


async def _role(service: Service, request: Request) -> Response:
    body = parse(await read(request), ROLE_CHANGE)
    if body.role not in list(Role):
        raise bad(f"role must be one of {', '.join(Role)}, not {body.role[:80]!r}", "role")
    _member(request).switch(Role(body.role))
    return as_json({}, 202)


async def _rejoin(service: Service, request: Request) -> Response:
    body = parse(await read(request), REJOIN)
    _member(request).rejoin(body.incarnation)
    return as_json({}, 202)


async def _drain(service: Service, request: Request) -> Response:
    _member(request).drain()
    return as_json({}, 202)


ROUTES: tuple[Route, ...] = (
    ("GET", "/pdlab/v1/instance", _instance),
    ("GET", "/pdlab/v1/report", _report),
    ("POST", "/pdlab/v1/continue", _continue),
    ("POST", "/pdlab/v1/release", _release),
    ("POST", "/pdlab/v1/renew", _renew),
    ("POST", "/pdlab/v1/export", _export),
    ("POST", "/pdlab/v1/lend", _lend),
    ("POST", "/pdlab/v1/role", _role),
    ("POST", "/pdlab/v1/drain", _drain),
    ("POST", "/pdlab/v1/rejoin", _rejoin),
    ("POST", "/pdlab/v1/relay", relayed),
)


def _member(request: Request) -> Member:
    member: Member | None = getattr(request.app.state, "member", None)
    if member is None:
        raise loading()
    return member


def _leg(service: Service, name: str) -> Generation:
    if (found := service.legs.get(name)) is None:
        raise ApiError(404, f"there is no leg {name[:80]!r} here", param="leg", code="leg_unknown")
    return found


def _directory(service: Service) -> Directory:
    if service.exchange is None:
        raise bad("this server does not exchange KV")
    return service.exchange.directory


def _exchanging(service: Service) -> Exchanging:
    if service.engine.down is not None:
        raise ApiError(503, service.engine.down, code="engine_down")
    if service.exchange is None:
        raise bad("this server does not exchange KV")
    return service.exchange.engine
