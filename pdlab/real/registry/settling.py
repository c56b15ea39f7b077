"""For how long a candidate has seen the store that it asks. One that was started, or emptied, without its data lets everybody claim what is
still held: in it nobody leads before whoever led the one before has lost its lease, which is one lease after the new one was first seen."""

from __future__ import annotations


class Seen:
    """Stores are told apart by the names that they were given when they were first used, so that it does not matter how short an outage
    was, nor whether anybody looked."""

    def __init__(self) -> None:
        self._store, self._since_s = "", 0.0
        self.changed = False  # another was seen before

    def for_s(self, store: str, now: float) -> float:
        """Since it was first seen."""
        if store != self._store:
            self.changed = bool(self._store)
            self._store, self._since_s = store, now
        return now - self._since_s
