"""One policy made of several: each hook is answered by the member named for it.

The members' bound methods become this object's own, so a hook costs no more than in the member itself. A member sees every event once,
however many hooks it answers; who overrides `observe` is listed in `observers`, which is empty where nobody needs the calls.
"""

from __future__ import annotations

from collections.abc import Mapping

from pdlab.core.policy import HOOKS, Policy
from pdlab.core.types import Event
from pdlab.core.view import Cluster


class Composed(Policy):
    """`Composed(dispatch=PrefixAware(), handoff=LeastKv())`: hooks left out are the plain Policy's."""

    def __init__(
        self,
        *,
        dispatch: Policy | None = None,
        handoff: Policy | None = None,
        migrate: Policy | None = None,
        resize: Policy | None = None,
    ) -> None:
        plain = Policy()
        given = (dispatch, handoff, migrate, resize)
        self.members: Mapping[str, Policy] = {hook: member or plain for hook, member in zip(HOOKS, given, strict=True)}
        distinct = list({id(m): m for m in self.members.values()}.values())
        self.observers = tuple(m for m in distinct if type(m).observe is not Policy.observe or getattr(m, "observers", False))
        for hook, member in self.members.items():
            setattr(self, hook, getattr(member, hook))
        if self.observers:
            setattr(self, Policy.observe.__name__, self._tell)
        self.queues = self.members["dispatch"].queues
        if self.queues:
            self.first, self.evict = self.members["dispatch"].first, self.members["dispatch"].evict  # type: ignore[method-assign]
        asked = [m for hook, m in self.members.items() if hook in ("migrate", "resize") or m.queues]
        ticks = [m.tick_s for m in asked if m.tick_s is not None]
        self.tick_s = min(ticks, default=None)
        self.pairs = self.members["dispatch"].pairs or self.members["handoff"].pairs

    @property
    def rests(self) -> bool:  # type: ignore[override]
        asked = [m for m in (self.members["resize"],) if type(m).resize is not Policy.resize]
        return all(m.rests for m in (*asked, *self.observers))

    def __repr__(self) -> str:
        return f"Composed({', '.join(f'{hook}={member!r}' for hook, member in self.members.items())})"

    def _tell(self, event: Event, cluster: Cluster) -> None:
        for member in self.observers:
            member.observe(event, cluster)
