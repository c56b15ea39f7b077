"""What goes wrong, and when: kills, stops, drains, slow instances, slow and cut links, instances cut apart, lost and late reports. Undone
after `for_s`, where that is given."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from pdlab.experiment.study import FaultSpec
from pdlab.sim.calls import call_later
from pdlab.sim.world import World


def plan(world: World, faults: Iterable[FaultSpec]) -> None:
    """Schedule every fault. Instances are named as in the experiment."""
    for fault in faults:
        begin, end = _actions(world, fault)
        _at(world, fault.at_s, begin)
        if fault.for_s is not None and end is not None:
            _at(world, fault.at_s + fault.for_s, end)


def _at(world: World, at_s: float, action: Callable[[], None]) -> None:
    call_later(world.env, at_s, lambda _: action())


def _actions(world: World, fault: FaultSpec) -> tuple[Callable[[], None], Callable[[], None] | None]:
    name = fault.instances[0]
    until_s = fault.at_s + fault.for_s if fault.for_s is not None else math.inf
    if fault.cut is not None:
        a, b = fault.cut
        return lambda: world.moves.cut(a, b, fault.by_s), lambda: world.moves.mend(a, b)
    if fault.kill is not None:
        return lambda: world.lifecycle.kill(name, fault.restart_after_s), None
    if fault.stop is not None:
        for_s = fault.for_s
        assert for_s is not None, "a stop has an end"
        return lambda: world.lifecycle.stand_still(name, for_s), None
    if fault.drain is not None:
        return lambda: world.lifecycle.drain(name), None
    if fault.lose_reports is not None:
        return lambda: world.silent_until_s.__setitem__(name, until_s), None
    if fault.delay_reports is not None:
        return lambda: world.late_until_s.__setitem__(name, (until_s, fault.by_s or 0.0)), None
    if fault.slow is not None:
        longer = 1.0 / (fault.factor or 1.0)
        decode_longer = 1.0 / fault.decode_factor if fault.decode_factor is not None else longer
        return lambda: world.slow_down(name, longer, decode_longer), lambda: world.slow_down(name, 1.0, 1.0)
    factor = fault.factor if fault.slow_link is not None and fault.factor is not None else 0.0
    return lambda: world.network.scale_bandwidth(name, factor), lambda: world.network.scale_bandwidth(name, 1.0)
