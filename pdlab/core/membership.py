"""Who takes part: every instance that has joined, who has left, and who is expected."""

from __future__ import annotations

from math import inf

from pdlab.core.router_limits import Limits
from pdlab.core.types import MADE, InstanceSpec, InstanceState, RegistryAway
from pdlab.core.view import Cluster, Instance


class Membership:
    """An instance is its name and its incarnation: what an older one still says is of no account."""

    def __init__(self, cluster: Cluster, limits: Limits) -> None:
        self.cluster, self.limits = cluster, limits
        self.by_name: dict[str, Instance] = {}
        self.starting = 0  # asked for by Scale, and not yet joined
        self.left_s = -inf  # when an instance last left
        self.back_by_s = -inf  # until then one that has left may be back
        self.all_go_on = True  # each instance can go on from tokens that another has made
        self._registry_away = False

    @property
    def accepts(self) -> bool:
        """See `Router.accepts`."""
        if self.cluster.ready or self.cluster.now < self.left_s + self.limits.grace_s:
            return True
        states = [x.state for x in self.cluster.instances]
        expected = any(state is not InstanceState.GONE for state in states) or self.cluster.now < self.back_by_s
        back_soon = InstanceState.SUSPECT in states or InstanceState.SWITCHING in states
        return back_soon or (self._registry_away and expected)

    def registry_away(self, event: RegistryAway) -> None:
        self._registry_away = event.away

    def present(self, name: str, incarnation: int) -> Instance | None:
        """That instance, unless it has gone since, or another incarnation of it has come."""
        instance = self.by_name.get(name)
        if instance is None or instance.spec.incarnation != incarnation or instance.state is InstanceState.GONE:
            return None
        return instance

    def expect(self, count: int) -> None:
        """So many will join."""
        self.starting += count

    def admit(self, spec: InstanceSpec) -> None:
        """It joins, the first of its name or a later incarnation."""
        if spec.name not in self.by_name and self.starting:
            self.starting -= 1
        instance = self.by_name[spec.name] = self.cluster.admit(spec)
        instance.heard_s = self.cluster.now
        self.all_go_on = self.all_go_on and instance.can(MADE)
        self.cluster.refresh()

    def dismiss(self, instance: Instance, *, died: bool) -> None:
        """It has gone. One that has lost its place only may be back as long as it would have been suspect."""
        instance.state = InstanceState.GONE
        self.left_s = self.cluster.now
        back_s = self.limits.grace_s if died else max(self.limits.grace_s, self.limits.suspect_s)
        self.back_by_s = max(self.back_by_s, self.cluster.now + back_s)
        self.all_go_on = all(x.can(MADE) for x in self.cluster.instances if x.state is not InstanceState.GONE)
        self.cluster.refresh()
        self.cluster.reach.forget(instance.name)
        self.cluster.index.drop(instance.bit)
        self.cluster.links.forget(instance.name)
