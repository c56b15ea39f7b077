"""What steps take on a core that nobody disturbs, from what they took on one that is disturbed now and then.

Each repeat knows how long a short loop took on its core meanwhile (`pdlab.real.host.core_probe`). Where the loop takes r times as long as
undisturbed, steps take 1 + share (r - 1) times as long, those with prompts by another share than those that only decode. The share is the
regression over the repeats of each point, about a value from elsewhere, which counts where calibration saw little of both.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from pdlab.cost.profile import CoreSpeed, MeasuredPoint

CALM = 5  # percentile of the looks that is taken for undisturbed
# 1,070 products of 64 tokens and of one with 425 MB of weights, on two cores of an AMD EPYC in 90 s, a third of it disturbed: 0.41 and
# 0.39 of those of 64, 0.32 and 0.33 of those of one; 5 % was left.
SHARE, SHARE_SD, LEFT_SD = 0.36, 0.1, 0.05
ENOUGH_S = 0.03  # of a repeat, to be looked at several times


def unsteadiness(measured: Iterable[MeasuredPoint]) -> CoreSpeed:
    """How the steps go with the loop. Nothing is known where nobody looked."""
    watched = [m for m in measured if len(m.loop_s) == len(m.seconds)]
    if not watched:
        return CoreSpeed()
    prefill, decode = ([m for m in watched if _prefills(m) is kind] for kind in (True, False))
    prefill_s, decode_s = _calm_loop_s(prefill), _calm_loop_s(decode)
    return CoreSpeed(
        prefill_loop_s=prefill_s,
        decode_loop_s=decode_s,
        prefill_share=_share(prefill, prefill_s),
        decode_share=_share(decode, decode_s),
    )


def calmed(measured: Iterable[MeasuredPoint], unsteady: CoreSpeed) -> list[MeasuredPoint]:
    """The same points with what each repeat would have taken undisturbed; as they are where nobody looked."""
    return [m.model_copy(update={"seconds": _calm_s(m, unsteady)}) if m.loop_s else m for m in measured]


def _prefills(measured: MeasuredPoint) -> bool:
    return measured.point.kind != "decode"


def _calm_loop_s(watched: Sequence[MeasuredPoint]) -> float:
    """Of the loop beside them, undisturbed; 0 where nobody looked."""
    return float(np.percentile([look for m in watched for look in m.loop_s], CALM)) if watched else 0.0


def _share(watched: Sequence[MeasuredPoint], calm_s: float) -> float:
    rows = [(np.array(m.seconds), np.maximum(np.array(m.loop_s) / calm_s - 1.0, 0.0)) for m in watched]
    share = SHARE
    for _ in range(5):  # since a point's undisturbed time depends on it
        up, down = SHARE / SHARE_SD**2, 1.0 / SHARE_SD**2
        for took_s, more in rows:
            longer = took_s / np.median(took_s / (1.0 + share * more)) - 1.0
            of = np.minimum(1.0, took_s / ENOUGH_S) / LEFT_SD**2
            apart = more - np.average(more, weights=of)
            up += float((of * apart * (longer - np.average(longer, weights=of))).sum())
            down += float((of * apart**2).sum())
        share = max(0.0, up / down)
    return share


def _calm_s(measured: MeasuredPoint, unsteady: CoreSpeed) -> tuple[float, ...]:
    prefill = _prefills(measured)
    return tuple(
        took_s / unsteady.longer(unsteady.slower(look_s, prefill=prefill), prefill=prefill)
        for took_s, look_s in zip(measured.seconds, measured.loop_s, strict=True)
    )
