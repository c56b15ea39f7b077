"""What the policy is asked at its ticks: whom to move, who changes role, how many there are."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from pdlab.core.blame import MISTAKES
from pdlab.core.membership import Membership
from pdlab.core.policy import Policy
from pdlab.core.reply import RouterReply
from pdlab.core.types import DRAIN, MIGRATE, SWITCH, InstanceState, Leads, Migrate, Role, Scale, Stage, Stop, Switch, UsageError
from pdlab.core.view import Cluster, Instance

LEAST_TICK_S = 0.001
DECODE = Stage.DECODE  # enum look-ups cost


class Rebalance:
    """`autoscale` is the least and the most instances that a policy may scale to; None: it may not."""

    def __init__(
        self, cluster: Cluster, policy: Policy, membership: Membership, reply: RouterReply, autoscale: tuple[int, int] | None
    ) -> None:
        if policy.tick_s is not None and not policy.tick_s >= LEAST_TICK_S:
            raise UsageError(f"policy {type(policy).__name__}: tick_s must be at least {LEAST_TICK_S:g} s, not {policy.tick_s:g}")
        self.cluster, self.policy, self.membership, self.reply = cluster, policy, membership, reply
        self.reach = cluster.reach
        self.autoscale = autoscale
        self.tick_s = min(1.0, policy.tick_s) if policy.tick_s else 1.0
        self.due_s = 0.0  # when the policy is asked next
        self.leads = True  # of several routers, this one resizes

    @property
    def ticks(self) -> int:
        """Every so many ticks the policy is asked; 1 where it never is."""
        return ceil((self.policy.tick_s or self.tick_s) / self.tick_s - 1e-9)

    def tick(self) -> None:
        now = self.cluster.now
        if self.policy.tick_s and now >= self.due_s - 1e-9:
            self.due_s = now + self.policy.tick_s
            self._migrations()
            if self.leads:
                self._resizes()

    def led(self, event: Leads) -> None:
        self.leads = event.leading

    def _migrations(self) -> None:
        try:
            wanted = list(self.policy.migrate(self.cluster))
        except MISTAKES as error:
            raise self.reply.blame("migrate", None, error) from error
        for wish in wanted:
            if not _pair_of(wish, int, Instance):
                raise self.reply.blame("migrate", None, f"returned {wish!r}, not a request's id and an instance")
            request_id, target = wish
            live = self.cluster.live.get(request_id)
            if live is None or live.stage is not DECODE or live.migrating is not None or live.decode is None:
                continue
            if not target.ready:
                raise self.reply.blame("migrate", request_id, f"returned {target.name}, which is {target.state}")
            if self.cluster.can_migrate(live, target):
                self.reach.sends(live.decode.name, target.name, self.cluster.now)
                live.migrating = target
                self.cluster.links.moving[live] = live.decode, target, self.cluster.context_tokens(live)
                self.reply.actions.append(Migrate(request_id, live.attempt, live.decode.name, target.name))
            elif live.request.best_of > 1:
                self.reply.notice("migrate: requests with best_of above 1 cannot be moved")
            elif target is not live.decode:
                self.reply.can(MIGRATE, "migrate", live.decode, target)

    def _resizes(self) -> None:
        try:
            wanted = list(self.policy.resize(self.cluster))
        except MISTAKES as error:
            raise self.reply.blame("resize", None, error) from error
        swap = self._swaps(wanted)
        for want in wanted:
            if isinstance(want, Scale):
                self._scale(want)
                continue
            if not _pair_of(want, Instance, Role):
                raise self.reply.blame("resize", None, f"returned {want!r}, not an instance and a role, or a Scale")
            instance, role = want
            if not instance.ready:
                raise self.reply.blame("resize", None, f"wants to switch {instance.name}, which is {instance.state}")
            if role is not instance.role and self.reply.can(SWITCH, "resize", instance) and (swap or self._role_survives(instance, role)):
                instance.state = InstanceState.SWITCHING
                self.cluster.refresh()
                self.reply.actions.append(Switch(instance.name, role))

    def _scale(self, want: Scale) -> None:
        if self.autoscale is None:
            raise self.reply.blame("resize", None, f"asks for {want.count:+d} {want.role} where cluster.autoscale is off")
        least, most = self.autoscale
        size = sum(x.state is not InstanceState.GONE for x in self.cluster.instances) + self.membership.starting
        if want.count > 0:
            count = min(want.count, most - size)
            if count > 0:
                self.membership.expect(count)
                self.reply.actions.append(Scale(count, want.role))
            return
        staying = sum(x.state not in (InstanceState.GONE, InstanceState.DRAINING) for x in self.cluster.instances)
        leaving = [x for x in self.cluster.instances if x.ready and x.role is want.role][want.count :]
        for instance in leaving[::-1][: max(0, staying - least)]:
            if self.reply.can(DRAIN, "resize", instance) and self._role_survives(instance, None):
                instance.state = InstanceState.DRAINING
                self.cluster.refresh()
                self.reply.actions.append(Stop(instance.name))

    def _swaps(self, wanted: Sequence[tuple[Instance, Role] | Scale]) -> bool:
        """Does one that prefills take the role of one that decodes, and the other way round? Meanwhile requests wait, at worst."""
        pairs = [want for want in wanted if not isinstance(want, Scale) and _pair_of(want, Instance, Role)]
        changes = {(x.role, role) for x, role in pairs if x.can(SWITCH)}
        return {(Role.PREFILL, Role.DECODE), (Role.DECODE, Role.PREFILL)} <= changes

    def _role_survives(self, instance: Instance, role: Role | None) -> bool:
        """Would both phases have a ready instance once this one has changed its role (or gone, with None)? Until then another must be
        ready, and serves both where nobody else does."""
        others = [x.role for x in self.cluster.instances if x.ready and x is not instance]
        after = others if role is None else [*others, role]
        prefills, decodes = any(r.prefills for r in after), any(r.decodes for r in after)
        return bool(others) and (prefills or not instance.role.prefills) and (decodes or not instance.role.decodes)


def _pair_of(answer: object, first: type, second: type) -> bool:
    """A hook may return anything."""
    return isinstance(answer, tuple | list) and len(answer) == 2 and isinstance(answer[0], first) and isinstance(answer[1], second)
