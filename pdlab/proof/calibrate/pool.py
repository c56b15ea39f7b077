"""Several calibrations of one instance as one: a shared machine is not equally fast at all times."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TypeVar

from pdlab.core.types import UsageError
from pdlab.cost.profile import FrontCosts, InstanceProfile, Interference, Overheads
from pdlab.proof.calibrate.fit import errors, fit, warnings
from pdlab.proof.calibrate.neighbour import beside
from pdlab.proof.calibrate.rounds import together
from pdlab.proof.calibrate.undisturbed import calmed, unsteadiness

Part = TypeVar("Part", Overheads, Interference, FrontCosts)


def pooled(profiles: Sequence[InstanceProfile]) -> InstanceProfile:
    """Fitted to all that any of them measured; transfers are the middle one's, and all else the median: whatever else computed during one
    calibration shows in what neighbours cost there. Raises UsageError where they are not of the same instance."""
    first = profiles[0]
    for other in profiles[1:]:
        if (other.model, other.engine) != (first.model, first.engine):
            raise UsageError(f"profiles of {first.name} and {other.name} are not of the same instance: only such can be pooled")
    points = together(profile.points for profile in profiles)
    seen = [s for profile in profiles for s in profile.beside_seen]
    references = [m for profile in profiles for m in profile.references]
    unsteady = unsteadiness([*points, *references])
    calm = calmed(points, unsteady)
    steps = fit(calm)
    judged = errors(steps, calm)
    said = [line for profile in profiles for line in profile.warnings if not line.startswith("the fit is poor")]
    overheads = _medians(Overheads, [profile.overheads for profile in profiles])
    moving = sorted((profile for profile in profiles if profile.transfer is not None), key=lambda profile: profile.overheads.handoff_s)
    middle = moving[len(moving) // 2] if moving else first  # its set-up and its bytes/s belong together
    return first.model_copy(
        update={
            "steps": steps,
            "overheads": overheads.model_copy(update={"handoff_s": middle.overheads.handoff_s}),
            "beside": beside(seen) if seen else _medians(Interference, [profile.beside for profile in profiles]),
            "beside_seen": tuple(seen),
            "front": _medians(FrontCosts, [profile.front for profile in profiles]),
            "unsteady": unsteady,
            "transfer": middle.transfer,
            "errors": judged,
            "warnings": tuple(dict.fromkeys([*said, *warnings(judged)])),
            "points": tuple(points),
            "references": tuple(references),
        }
    )


def _medians(kind: type[Part], parts: Sequence[Part]) -> Part:
    """Field by field."""
    return kind(**{name: statistics.median([getattr(part, name) for part in parts]) for name in kind.model_fields})
