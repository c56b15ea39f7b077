"""Which instances do not reach each other: kept for a while after a transfer between them has failed, then tried again by one request."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from pdlab.real.cluster.instances import Member

log = logging.getLogger(__name__)
LEAST_S, MOST_S = 5.0, 60.0  # between two tries


@dataclass(slots=True)
class _Cut:
    pause_s: float
    until_s: float
    trying: bool = False


class Pairs:
    """From a prefill instance to a decode instance. An incarnation takes what is known of it along."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._cuts: dict[tuple[Member, Member], _Cut] = {}

    def failed(self, src: Member, dst: Member, reason: str) -> None:
        """A transfer did. Those that were under way together count once."""
        now, cut = self._now(), self._cuts.get((src, dst))
        if cut is not None and not cut.trying and now < cut.until_s:
            return
        pause_s = LEAST_S if cut is None else min(2 * cut.pause_s, MOST_S)
        self._cuts[src, dst] = _Cut(pause_s, now + pause_s)
        log.warning("no KV from %s to %s for the next %g s: %s", src.name, dst.name, pause_s, reason)

    def came(self, src: Member, dst: Member) -> None:
        if self._cuts.pop((src, dst), None) is not None:
            log.info("KV from %s reaches %s again", src.name, dst.name)

    def doubtful(self, src: Member, dst: Member) -> bool:
        """Has the last transfer between them failed?"""
        return (src, dst) in self._cuts

    def tries(self, src: Member, dst: Member) -> bool:
        """Is a request to go there? Of those after a pause the first one is; the others wait for what comes of it."""
        cut, now = self._cuts.get((src, dst)), self._now()
        if cut is None:
            return True
        if now < cut.until_s:
            return False
        cut.trying, cut.until_s = True, now + cut.pause_s
        return True

    def forget(self, member: Member) -> None:
        """It has gone."""
        self._cuts = {pair: cut for pair, cut in self._cuts.items() if member not in pair}
