from __future__ import annotations

import gc

from pdlab.core.garbage_collection import LOOK_EVERY
from pdlab.real.launch.instance import run_until_stopped


def test_a_server_is_not_held_up_by_the_garbage_collector() -> None:
    """Its modules, a hundred thousand objects, are not looked through again and again."""
    seen: list[tuple[int, int]] = []

    async def main() -> None:
        seen.append((gc.get_threshold()[0], gc.get_freeze_count()))

    before = gc.get_threshold()
    run_until_stopped(main())
    ((threshold, frozen),) = seen
    assert threshold == LOOK_EVERY and frozen > 10_000
    assert gc.get_threshold() == before and gc.get_freeze_count() < frozen
