"""The one event of the simulator's own: something is to be called when its time comes. `pdlab.sim.calls` makes them.

It never fails, and nobody but its call waits for it, which spares it most of what a SimPy event costs. It has what SimPy's `step` asks of
an event. It is compiled nowhere: msgspec makes one in a third of the time that a class of Python takes, and a run makes millions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import msgspec


class DueCall(msgspec.Struct, eq=False):
    """`call` is called with this event, from which it takes the `value`."""

    call: Callable[[Any], None]
    value: Any = None

    _ok: ClassVar[bool] = True

    @property
    def callbacks(self) -> list[Callable[[Any], None]]:
        return [self.call]

    @callbacks.setter
    def callbacks(self, over: None) -> None:
        """SimPy has taken them. It is not called again, as it is in no queue any more."""
