"""What a batching has that goes by how long steps take."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from pdlab.core.types import StepTime


class Foresight(ABC):
    """It is told an instance's profiles, as an InstanceSpec has them, and of its steps. While prompts wait it is asked again after every
    step, or after so many as it says, since time alone changes its answer."""

    @abstractmethod
    def profile(self, prefill: tuple[tuple[int, float], ...], decode: tuple[tuple[int, int, float], ...]) -> None: ...
    @abstractmethod
    def learn(self, step: StepTime) -> None: ...

    def lasts(self, scheduler: Any) -> int:
        """Steps of decodes alone, just chosen, for which it would choose the same if nothing arrives."""
        return 1
