"""What KV exchange has to say: to the other process of the instance, and in an engine's step."""

from __future__ import annotations

from itertools import count

from pdlab.real.engine.messages import Exported, Holds, News, Submit, Tokens


class KvNews:
    """`told` are news for the other process, `outputs` tokens. Leases and tickets are named here, after `engine_id`."""

    def __init__(self, engine_id: str) -> None:
        self.engine_id = engine_id
        self.told: list[News | Exported | Holds] = []
        self.outputs: list[Tokens] = []
        self._numbers = count(1)

    def refuse(self, submit: Submit, reason: str) -> None:
        self.outputs += [Tokens(submit.id, index, 0, [], "error", error=reason) for index in range(max(1, submit.sampling.best_of))]

    def name(self) -> str:
        """One that was never used."""
        return f"{self.engine_id}/{next(self._numbers)}"

    def take(self) -> tuple[list[News | Exported | Holds], list[Tokens]]:
        """What was said since the last time."""
        said = self.told, self.outputs
        self.told, self.outputs = [], []
        return said

    def __bool__(self) -> bool:
        return bool(self.told or self.outputs)
