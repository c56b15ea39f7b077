"""The control plane, sans-IO: `handle(event, now)` -> actions.

The router keeps a view of the instances that only events change, asks the policy, and turns its answers into actions. An attempt at
serving a request is bound to incarnations: whatever an older one still says changes nothing.

    Arrived -> dispatch? -> Dispatch ... PrefillDone -> handoff? -> Handoff ... Transferred ... Finished

Each event has one handler, in the part that owns what it changes. Who needs whom, from the ground:

    Membership, Ledger    who takes part; what is assigned to each
    Attempts              what is taken back, lost and tried again, and how a request ends
    Transfers, Candidates KV on its way; among whom the policy is asked
    Requests              dispatch, hand-off, the queues of those that wait
    Liveness              instances join, leave, report, and are suspected
    Rebalance             migrations, role switches and sizes, at the policy's ticks

An instance that dies is fenced by its incarnation; what it served is dispatched anew, with the tokens its clients already have as part of
the prompt.

A way on which KV did not come is closed for a while (`reach`): requests are then decoded by others, or stay where they were prefilled.

Whoever can never hold a request (its KV blocks, its model's context) is left out of the view before the policy is asked for it. Where
nobody can, now or when those come back that are expected to, the request is refused, with the numbers.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from pdlab.core.attempts import Attempts
from pdlab.core.blame import MISTAKES
from pdlab.core.candidates import Candidates
from pdlab.core.instance_news import Liveness
from pdlab.core.ledger import Ledger
from pdlab.core.membership import Membership
from pdlab.core.policy import Policy
from pdlab.core.rebalance import Rebalance
from pdlab.core.reply import RouterReply
from pdlab.core.requests import Requests
from pdlab.core.router_limits import Limits
from pdlab.core.transfers import Transfers
from pdlab.core.types import (
    Action,
    AnyEvent,
    Arrived,
    Cancelled,
    Drained,
    Failed,
    Fetched,
    Finished,
    InstanceState,
    Joined,
    Leads,
    Left,
    Lost,
    Migrated,
    PrefillDone,
    Refused,
    RegistryAway,
    Report,
    Suspected,
    Switched,
    Tick,
    TransferFailed,
    Transferred,
    Unreachable,
)
from pdlab.core.view import Capacity, Cluster

READY, GONE = InstanceState.READY, InstanceState.GONE  # enum look-ups cost


class Router:
    """`seed` feeds the one generator policies may draw from. `hash_tokens` is the prompt tokens behind one prefix hash. With
    `reserve_first` decode instances are chosen at dispatch and reserve blocks before prefill starts. `first_token` says which of the
    two instances sends it ("prefill" or "decode"). `autoscale` is the least and the most instances that a policy may scale to; None: it
    may not."""

    def __init__(
        self,
        policy: Policy,
        *,
        seed: int = 0,
        limits: Limits | None = None,
        hash_tokens: int = 16,
        ttft_slo_s: float = 1.0,
        tpot_slo_s: float = 0.05,
        reserve_first: bool = False,
        first_token: str = "prefill",
        autoscale: tuple[int, int] | None = None,
    ) -> None:
        self.policy = policy
        self.limits = limits = limits or Limits()
        self.pairs = policy.pairs or reserve_first
        self.first_token, self.autoscale = first_token, autoscale
        tokens: dict[int, int] = {}
        self.cluster = cluster = Cluster(
            random.Random(seed),
            hash_tokens=hash_tokens,
            ttft_slo_s=ttft_slo_s,
            tpot_slo_s=tpot_slo_s,
            capacity=Capacity(tokens),
        )
        cluster.autoscale = autoscale
        self._reply = reply = RouterReply(policy, cluster)
        self.ledger = Ledger(cluster)
        self.membership = membership = Membership(cluster, limits)
        self.by_name = membership.by_name
        self.requests = Requests(
            cluster,
            policy,
            limits,
            membership,
            self.ledger,
            Attempts(cluster, tokens, self.ledger, membership, reply, limits, first_token),
            Transfers(cluster, limits, reply),
            Candidates(cluster, policy, membership, reply),
            reply,
            pairs=self.pairs,
        )
        self.liveness = Liveness(cluster, limits, membership, self.ledger, self.requests, reply)
        self.rebalance = Rebalance(cluster, policy, membership, reply, autoscale)
        self.tick_s = self.rebalance.tick_s
        self._minds_rest = self._acts_without_requests(policy)
        self._observes = type(policy).observe is not Policy.observe or getattr(policy, "observers", False)
        self._handlers: dict[type, Callable[..., None]] = {
            Arrived: self.requests.arrived,
            Cancelled: self.requests.cancelled,
            Joined: self.liveness.joined,
            Left: self.liveness.left,
            Report: self.liveness.report,
            Refused: self.requests.refused,
            PrefillDone: self.requests.prefill_done,
            Fetched: self.requests.fetched,
            Transferred: self.requests.transferred,
            TransferFailed: self.requests.transfer_failed,
            Unreachable: self.requests.unreachable,
            Migrated: self.requests.migrated,
            Lost: self.requests.lost,
            Finished: self.requests.finished,
            Failed: self.requests.failed,
            Switched: self.liveness.switched,
            Drained: self.liveness.drained,
            Leads: self.rebalance.led,
            RegistryAway: membership.registry_away,
            Suspected: self.liveness.suspected,
            Tick: self._tick,
        }

    @staticmethod
    def _acts_without_requests(policy: Policy) -> bool:
        """May the policy act or learn on a cluster at rest? Without requests there is nothing to place or to move."""
        observes = type(policy).observe is not Policy.observe or bool(getattr(policy, "observers", False))
        resizes = policy.tick_s is not None and getattr(policy.resize, "__func__", None) is not Policy.resize
        return observes or resizes

    @property
    def accepts(self) -> bool:
        """May requests come? Somebody is ready, has left within `Limits.grace_s`, or is not ready only because nothing was heard of it."""
        return self.membership.accepts

    @property
    def leads(self) -> bool:
        """Of several routers, does this one resize?"""
        return self.rebalance.leads

    @property
    def overloaded(self) -> bool:
        """Are as many requests in flight as may be?"""
        most = self.limits.max_in_flight
        return most is not None and len(self.cluster.live) >= most

    @property
    def rests(self) -> bool:
        """Would ticks, and reports of no load, change nothing until something else happens? A world need not tell them then."""
        policy_rests = self.policy.rests or not self._minds_rest
        return policy_rests and not self.cluster.live and all(x.state in (READY, GONE) for x in self.cluster.instances)

    @property
    def blindness(self) -> str:
        """In words, that the policy has asked for predictions of instances of which nothing is known; ""."""
        blind = self.cluster.blind
        if not blind:
            return ""
        return (
            f"policy {type(self.policy).__name__} asks how long steps take on {', '.join(sorted(blind))}, and was told 0 s: neither a "
            "profile nor, by then, a step of them was known. Give them hardware: profile.json (pdlab calibrate), or let them measure "
            "themselves (without --no-self-profile)"
        )

    @property
    def policy_ticks(self) -> int:
        """Every so many ticks the policy is asked for migrations and sizes; 1 where it never is."""
        return self.rebalance.ticks

    def rested(self, *, reports_s: float = 0.0, ticks_s: float = 0.0) -> None:
        """So many seconds of reports, or of ticks, are left out, as nothing was to be said."""
        self.liveness.rested(reports_s)
        self.rebalance.due_s += ticks_s

    def handle(self, event: AnyEvent, now: float) -> list[Action]:
        """Take in what happened at `now`; returns what to do about it, in order. `now` never goes back."""
        self.cluster.now = now
        actions: list[Action] = []
        self._reply.actions = actions
        self._handlers[event.__class__](event)
        if self._observes:
            try:
                self.policy.observe(Arrived(event.request) if isinstance(event, Arrived) else event, self.cluster)
            except MISTAKES as error:
                raise self._reply.blame("observe", None, error) from error
        return actions

    def _tick(self, event: Tick) -> None:
        if event.late_s > 0.0:
            self.liveness.stood_still(event.late_s)
            self.requests.transfers.stood_still(event.late_s)
        self.requests.expire()
        self.liveness.listen()
        if self.policy.queues:
            self.requests.evict()
        self.rebalance.tick()
        self.requests.retry()

    def check(self) -> None:
        """Invariant 3: each instance's ledger is the sum over the live requests assigned to it."""
        self.ledger.check()
