"""What goes wrong in a round of the dice, and when: a function of the seed alone. `faults` says the same to the simulator."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

ROUND_S = 20.0  # requests come for so long
INSTANCES = {"p0": "prefill", "p1": "prefill", "d0": "decode", "d1": "decode"}
ROUTER = "r1"  # the one that may die; clients of it may see their connection break
KINDS = {"kill": 4, "stop": 3, "cut": 3, "registry": 2, "router": 1, "disk": 1, "hang_up": 2}  # how often, one against another
LASTS_S = {"stop": (0.5, 8.0), "cut": (0.5, 6.0), "registry": (1.0, 12.0), "disk": (2.0, 6.0)}


@dataclass(frozen=True, slots=True)
class Trouble:
    """`whom`: an instance, a router, or how the registry's server goes ("killed", "stopped"); of hang-ups, how many clients. `for_s` is 0
    where it is over when it has happened: who was killed is started again at once, and is back when it is ready."""

    at_s: float
    kind: str
    whom: str
    for_s: float = 0.0


def schedule(seed: int, number: int, *, disk: bool = True) -> list[Trouble]:
    """Two to four troubles of round `number`, in their order. No instance is in two of them, and one of each role is in none, so that a
    round says what the cluster bears rather than that nobody was there. `disk`: can a disk be filled here?"""
    rng = random.Random(f"dice {seed} {number}")
    left = sorted(INSTANCES)
    rng.shuffle(left)
    spared = {next(name for name in left if INSTANCES[name] == role) for role in ("prefill", "decode")}
    struck = [name for name in left if name not in spared]
    kinds = [kind for kind in KINDS if disk or kind != "disk"]
    troubles: list[Trouble] = []
    for _ in range(rng.randint(2, 4)):
        kind = rng.choices(kinds, [KINDS[kind] for kind in kinds])[0]
        at_s = round(rng.uniform(1.0, 0.7 * ROUND_S), 2)
        for_s = round(rng.uniform(*LASTS_S[kind]), 2) if kind in LASTS_S else 0.0
        if kind in ("kill", "stop", "cut"):
            if struck:
                troubles.append(Trouble(at_s, kind, struck.pop(), for_s))
        elif kind == "hang_up":
            troubles.append(Trouble(at_s, kind, str(rng.randint(1, 6))))
        elif not any(one.kind == kind for one in troubles):
            whom = {"registry": rng.choice(("killed", "stopped")), "router": ROUTER, "disk": "r0"}[kind]
            troubles.append(Trouble(at_s, kind, whom, for_s))
    return sorted(troubles, key=lambda one: one.at_s)


def arrivals(seed: int, number: int, rate: float) -> list[float]:
    """When requests come, in seconds since the round began: a Poisson process of `rate` requests a second."""
    rng = random.Random(f"arrivals {seed} {number}")
    found, now = list[float](), 0.0
    while (now := now + rng.expovariate(rate)) < ROUND_S:
        found.append(now)
    return found


def faults(troubles: Iterable[Trouble], back_s: Mapping[str, float]) -> list[dict[str, Any]]:
    """The `faults` of an experiment with the same instances. `back_s` says after how long who was killed was back. What the
    simulator has no word for is left out, since it is to change nothing: registry, disk, router; and clients that hang up."""
    found: list[dict[str, Any]] = []
    for one in troubles:
        if one.kind == "kill":
            found.append({"at_s": one.at_s, "kill": one.whom, "restart_after_s": back_s[one.whom]})
        elif one.kind == "stop":
            found.append({"at_s": one.at_s, "stop": one.whom, "for_s": one.for_s})
        elif one.kind == "cut":
            found.append({"at_s": one.at_s, "cut_link": one.whom, "for_s": one.for_s})
    return found
