"""What a transport achieves of a link's line rate.

Two constants do for whole messages: t(size) = setup + size / (efficiency * line). Small messages then reach a small part of the line
rate, half of the achievable one at size = setup * efficiency * line. A third, operations per second, limits transports that post one
operation for each contiguous piece, as KV blocks scattered over memory need.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Transport:
    """What moving KV costs on top of the wire. `setup_s` is spent before a transfer's first byte, `efficiency` is the achieved part of the
    line rate for large messages, `operations_per_s` (one endpoint's, all NICs together) bounds transfers of small pieces."""

    name: str
    setup_s: float = 0.0
    efficiency: float = 1.0
    operations_per_s: float = inf
    source: str = ""

    def bytes_per_s(self, line_bytes_per_s: float, piece_bytes: float = inf) -> float:
        """Bytes/s that long transfers of pieces of `piece_bytes` reach on links of `line_bytes_per_s`."""
        bound = self.operations_per_s * piece_bytes if self.operations_per_s < inf and piece_bytes < inf else inf
        return min(line_bytes_per_s * self.efficiency, bound)

    def transfer_s(self, size_bytes: float, line_bytes_per_s: float, piece_bytes: float = inf) -> float:
        """Seconds for one transfer alone."""
        return self.setup_s + size_bytes / self.bytes_per_s(line_bytes_per_s, piece_bytes)


IDEAL = Transport(name="ideal", source="the line rate, no set-up")

MOONCAKE_ROCE = Transport(
    name="mooncake-roce",
    setup_s=368e-6,
    efficiency=0.693,
    source="least worst error (5.3 %) over nine transfers of 20 MB to 4.5 GB on 200 GB/s of RoCE (8 ConnectX-7, H800), Mooncake under "
    "vLLM v1: kvcache-ai/Mooncake@3b5a594 docs/source/performance/vllm/vllm-v1-pd-performance.md",
)

MOONCAKE_EFA = Transport(
    name="mooncake-efa",
    efficiency=0.86,
    operations_per_s=1.39e6,
    source="least worst error (6.3 %) over six piece sizes of 64 KiB to 2 MiB on 400 GB/s of AWS EFA (16 x 200 Gb/s, p5en, H200); "
    "bandwidths only, so no set-up: kvcache-ai/Mooncake@3b5a594 docs/source/design/transfer-engine/efa_transport.md",
)

TRANSPORTS = (IDEAL, MOONCAKE_ROCE, MOONCAKE_EFA)
