"""The control plane that a deployment asks for: the same for `sim`, `serve`, and `replay`."""

from __future__ import annotations

from pdlab.core.policy import Policy
from pdlab.core.router import Router
from pdlab.core.router_limits import Limits
from pdlab.experiment.deployment import Deployment
from pdlab.policies import load as load_policy


def router(deployment: Deployment, *, hash_tokens: int, policy: Policy | None = None) -> Router:
    """A fresh one. `hash_tokens` is the prompt tokens behind one prefix hash; `policy` is asked in place of the deployment's."""
    limits, reports = deployment.limits, deployment.cluster.reports
    scale = deployment.cluster.autoscale
    return Router(
        policy or load_policy.build(deployment.policy, deployment.base_dir),
        seed=deployment.seed,
        limits=Limits(
            request_timeout_s=limits.request_timeout_s,
            transfer_timeout_s=deployment.transfer.timeout_s,
            max_attempts=limits.max_attempts,
            lease_s=max(limits.lease_s, 3 * reports.period_s + reports.delay_s),
            probe_s=limits.probe_s,
            suspect_s=limits.suspect_s,
            grace_s=limits.grace_s,
            max_in_flight=limits.max_in_flight,
        ),
        hash_tokens=hash_tokens,
        ttft_slo_s=deployment.slo.ttft_s,
        tpot_slo_s=deployment.slo.tpot_s,
        reserve_first=deployment.transfer.reserve_first,
        first_token=deployment.transfer.first_token,
        autoscale=(scale.min, scale.max) if scale.enabled else None,
    )
