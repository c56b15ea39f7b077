"""Both worlds' instances say the same of themselves where they are the same."""

from __future__ import annotations

from dataclasses import replace

from pdlab import batching
from pdlab.core.instance_spec import MeasuredInstance, Placed, instance_spec
from pdlab.core.kv import BlockPool
from pdlab.core.scheduler import Scheduler
from pdlab.core.types import InstanceSpec, Role
from pdlab.sim.build import world
from pdlab.sim.plans import plans
from pdlab.workload.spec import build
from tests.support.virtual_cluster import member_spec, small

LIVE = {"url", "capabilities", "descriptor"}  # that an instance has which can be asked
NETWORK = {"link_bytes_per_s", "host_bytes_per_s"}  # that the simulator knows, and transfers tell live


def test_a_simulated_and_a_live_instance_tell_the_same():
    experiment = small(prefill=1, decode=1, engine={"kv_blocks": 3000, "max_seqs": 40, "watermark": 0.02, "prefix_cache": False})
    simulated = world(experiment, build(experiment.workload, experiment.seed, experiment.base_dir))
    for name, instance in simulated.instances.items():
        plan = next(plan for plan in plans(experiment, 16) if plan.placement.name == name)
        live = member_spec(plan, name, 0)
        for field in InstanceSpec.__struct_fields__:
            if field not in LIVE | NETWORK:
                assert getattr(live, field) == getattr(instance.spec, field), field
        assert instance.spec.link_bytes_per_s == 25e9 and live.link_bytes_per_s == 0.0
        assert (live.prefix_cache, live.max_requests, live.spare_blocks) == (False, 80, 60)


def test_the_blocks_kept_free_are_the_schedulers():
    for watermark, blocks in ((0.01, 999), (0.0, 10), (0.3, 101)):
        scheduler = Scheduler(BlockPool(blocks, 16), batching.load("chunked"), watermark=watermark)
        placed = Placed(name="a", role=Role.MIXED, watermark=watermark, max_seqs=4)
        spec = instance_spec(placed, MeasuredInstance(kv_blocks=blocks, block_tokens=16))
        assert spec.spare_blocks == scheduler.spare_blocks
        assert spec.kv_most_tokens == scheduler.most_tokens


def test_an_instance_takes_in_two_requests_for_each_sequence_or_what_its_front_lets_in():
    placed, measured = Placed(name="a", role=Role.MIXED, max_seqs=4), MeasuredInstance(kv_blocks=10, block_tokens=16)
    assert instance_spec(placed, measured).max_requests == 8
    assert instance_spec(replace(placed, max_requests=5), measured).max_requests == 5
    assert instance_spec(replace(placed, max_requests=500), measured).max_requests == 8
    assert instance_spec(replace(placed, max_seqs=0), measured).max_requests == 0
