"""How fast the router decides: arrivals, hand-offs and ends against 32 instances, nothing else. Events per CPU-second, and dispatches.

    python experiments/bench_router.py [--policy least_loaded] [--instances 32]

Once with prompts that share nothing, and once with prompts of 62 hashed blocks, the first 32 of them one of 200 shared prefixes. Medians of
three.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

from pdlab.core.router import Router
from pdlab.core.types import Arrived, Dispatch, Finished, Handoff, InstanceSpec, Joined, PrefillDone, Report, Request, Role, Transferred
from pdlab.policies import load as load_policy


def chain(request: int) -> tuple[int, ...]:
    """Hashes of a prompt of 1000 tokens: 32 blocks that every 200th request has too, then 30 of its own."""
    shared, own = request % 200, 1_000_000 + request * 30
    return (*range(shared * 32, shared * 32 + 32), *range(own, own + 30))


def dispatches_per_cpu_s(policy: str, instances: int, requests: int, sharing: bool) -> tuple[float, float]:
    """(dispatches, events) per CPU-second, with 64 requests under way and a report of every instance each 500 requests."""
    router = Router(load_policy.build(policy, Path()), seed=1)
    for i in range(instances):
        role = Role.PREFILL if i % 2 == 0 else Role.DECODE
        profile = {
            "prefill_profile": ((256, 0.01), (1024, 0.03), (4096, 0.13)),
            "decode_profile": ((1, 100, 0.007), (8, 9000, 0.008), (64, 60000, 0.012)),
        }
        router.handle(Joined(InstanceSpec(name=f"i{i}", role=role, kv_blocks=20_000, **profile)), 0.0)  # type: ignore[arg-type]
    prompts = [Request(i, i * 1e-3, 1000, chain(i) if sharing else ()) for i in range(requests)]
    events = 0
    under_way: list[tuple[int, str]] = []
    started = time.process_time()
    for i, prompt in enumerate(prompts):
        now = prompt.arrival_s
        [dispatch] = router.handle(Arrived(prompt), now)
        assert isinstance(dispatch, Dispatch)
        answer = router.handle(PrefillDone(i, 1, dispatch.instance), now)
        decode = answer[0].dst if answer and isinstance(answer[0], Handoff) else dispatch.instance
        router.handle(Transferred(i, 1, decode), now)
        under_way.append((i, decode))
        events += 3
        if len(under_way) > 64:
            done, where = under_way.pop(0)
            router.handle(Finished(done, 1, where, 100), now)
            events += 1
        if i % 500 == 0:
            for k in range(instances):
                router.handle(Report(f"i{k}", 0, now, free_blocks=15_000, used_blocks=5_000, running=8), now)
    seconds = time.process_time() - started
    return requests / seconds, events / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--policy", nargs="*", default=["round_robin", "least_loaded", "power_of_two", "prefix_aware", "llumnix", "xllm_slo_aware"]
    )
    parser.add_argument("--instances", type=int, default=32)
    parser.add_argument("--requests", type=int, default=50_000)
    asked = parser.parse_args()
    print(f"| policy, {asked.instances} instances | prompts | requests / CPU s (4 events each) | events / CPU s |\n|---|---|---|---|")
    for policy in asked.policy:
        for sharing in (False, True):
            found = [dispatches_per_cpu_s(policy, asked.instances, asked.requests, sharing) for _ in range(3)]
            dispatches, events = (statistics.median(column) for column in zip(*found, strict=True))
            print(f"| {policy} | {'sharing' if sharing else 'unlike'} | {dispatches:,.0f} | {events:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
