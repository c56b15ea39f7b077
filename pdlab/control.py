"""The control plane that an experiment asks for: the same for `sim`, `serve`, and `replay`."""

from __future__ import annotations

from pdlab import __version__, load_policy
from pdlab.cluster import Links
from pdlab.log import Head
from pdlab.policy import Policy
from pdlab.router import Limits, Router
from pdlab.spec import Experiment


def router(experiment: Experiment, *, hash_tokens: int, policy: Policy | None = None) -> Router:
    """A fresh one. `hash_tokens` is the prompt tokens behind one prefix hash; `policy` is asked in place of the experiment's."""
    limits, reports = experiment.limits, experiment.cluster.reports
    network, scale = experiment.cluster.network, experiment.cluster.autoscale
    return Router(
        policy or load_policy.build(experiment.policy, experiment.base_dir),
        seed=experiment.seed,
        limits=Limits(
            request_timeout_s=limits.request_timeout_s,
            transfer_timeout_s=experiment.transfer.timeout_s,
            max_attempts=limits.max_attempts,
            lease_s=max(limits.lease_s, 3 * reports.period_s + reports.delay_s),
            probe_s=limits.probe_s,
            suspect_s=limits.suspect_s,
            grace_s=limits.grace_s,
            max_in_flight=limits.max_in_flight,
        ),
        hash_tokens=hash_tokens,
        ttft_slo_s=experiment.slo.ttft_s,
        tpot_slo_s=experiment.slo.tpot_s,
        reserve_first=experiment.transfer.reserve_first,
        first_token=experiment.transfer.first_token,
        autoscale=(scale.min, scale.max) if scale.enabled else None,
        links=Links((network.gbytes_per_s or 0.0) * 1e9, network.latency_us * 1e-6),
    )


def head_of(experiment: Experiment, policy: Policy, hash_tokens: int) -> Head:
    """The first line of its event log."""
    return Head(
        pdlab=__version__,
        seed=experiment.seed,
        policy=experiment.policy,
        policy_hash=load_policy.source_hash(policy),
        hash_tokens=hash_tokens,
        experiment=experiment.resolved(),
    )
