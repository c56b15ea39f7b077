"""When a migration copies again, and when it stops the request."""

from __future__ import annotations

from pdlab.core.staging import Staging


def test_a_short_context_is_copied_once_and_then_stopped_for() -> None:
    staging = Staging(16)
    assert staging.copy(1000) == 1000
    assert staging.stops(1000 + 16 * 16)
    assert staging.copy(1256) == 256
    assert staging.stages == 2


def test_what_is_made_meanwhile_is_copied_again_but_not_for_ever() -> None:
    staging = Staging(16)
    staging.copy(10_000)
    assert not staging.stops(10_000 + 16 * 16 + 1)
    staging.copy(20_000)
    assert staging.stops(40_000), "the third copy is the last, however much there is"


def test_what_the_destination_has_cached_is_not_copied() -> None:
    staging = Staging(16, cached_tokens=64)
    assert staging.copy(100) == 36
    assert staging.copy(90) == 0
    assert staging.copied_tokens == 100
