"""What an instance says of itself when it joins: made here, of how it was placed and what was measured of it, in both worlds."""

from __future__ import annotations

from dataclasses import dataclass

from pdlab.core.types import CAPABILITIES, InstanceSpec, Role

PLACES = 2  # for requests, for each sequence that can decode at once: more wait at the router, which may choose another for them


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """Who an instance is, where, and how it is set up. 0: not known; of `max_requests`, as many as it has places for."""

    name: str
    role: Role
    host: str = ""
    rack: str = ""
    zone: str = ""
    url: str = ""
    engine: str = "pdlab"
    model: str = ""
    max_seqs: int = 0
    max_batch_tokens: int = 0
    max_requests: int = 0
    prefix_cache: bool = True
    watermark: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredInstance:
    """What it turned out to be: its memory, and how fast it is. Profiles and the rest as in an InstanceSpec."""

    kv_blocks: int
    block_tokens: int
    block_bytes: int = 0
    context_tokens: int = 0
    sequence_tokens: int = 0
    prefill_profile: tuple[tuple[int, float], ...] = ()
    decode_profile: tuple[tuple[int, int, float], ...] = ()
    link_bytes_per_s: float = 0.0
    host_bytes_per_s: float = 0.0
    tells_cache: bool = True
    capabilities: tuple[str, ...] = CAPABILITIES
    descriptor: str = ""


def instance_spec(placed: Placed, measured: MeasuredInstance) -> InstanceSpec:
    places = PLACES * placed.max_seqs
    return InstanceSpec(
        name=placed.name,
        role=placed.role,
        kv_blocks=measured.kv_blocks,
        block_tokens=measured.block_tokens,
        block_bytes=measured.block_bytes,
        host=placed.host,
        rack=placed.rack,
        zone=placed.zone,
        max_seqs=placed.max_seqs,
        max_batch_tokens=placed.max_batch_tokens,
        prefix_cache=placed.prefix_cache,
        tells_cache=measured.tells_cache,
        prefill_profile=measured.prefill_profile,
        decode_profile=measured.decode_profile,
        link_bytes_per_s=measured.link_bytes_per_s,
        host_bytes_per_s=measured.host_bytes_per_s,
        url=placed.url,
        engine=placed.engine,
        model=placed.model,
        capabilities=measured.capabilities,
        descriptor=measured.descriptor,
        max_requests=min(placed.max_requests or places, places or placed.max_requests),
        context_tokens=measured.context_tokens,
        sequence_tokens=measured.sequence_tokens,
        spare_blocks=int(placed.watermark * measured.kv_blocks),
    )
