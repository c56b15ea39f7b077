"""How a transfer ended, and the trouble that ended it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["done", "failed", "expired"]


@dataclass(frozen=True, slots=True)
class TransferResult:
    """The one terminal status of a transfer. `expired`: the lease or ticket was over, a retry of the same is useless; `failed`: anything
    else, its deadline included, and the same blocks may be tried again. `bytes` of KV were moved in `seconds`."""

    status: Status
    bytes: int = 0
    seconds: float = 0.0
    reason: str = ""
    transport: str = ""


class TransferStopped(Exception):
    """Ends the transfer under way. `broken`: the connection, not the peer's decision, so that asking again can help."""

    def __init__(self, reason: str, status: Status = "failed", *, broken: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.status: Status = status
        self.broken = broken
