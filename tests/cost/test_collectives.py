"""Collectives against what is published of them."""

import pytest

from pdlab.cost import Parallel, hardware, model
from pdlab.cost.accelerator import AcceleratorSpec
from pdlab.cost.amounts import amounts, other_ranks
from pdlab.cost.collectives import all_to_all_s, crossing_share

# Dispatch and combine, microseconds: 128 tokens a rank, 7,168 wide, 8 experts each. H800, 400 Gb/s a GPU. Source: deepseek-ai/DeepEP,
# docs/legacy.md, low-latency kernels. Those of 8 ranks go over the network too, and say nothing of NVLink.
DEEPEP_US = {16: 118 + 195, 32: 155 + 273, 64: 173 + 314, 128: 192 + 369, 256: 194 + 360}
H800 = {"like": "h100-sxm", "scaleup_gbytes_per_s": 160, "nic_gbit_per_s": 400}


@pytest.mark.parametrize(("ranks", "measured_us"), DEEPEP_US.items())
def test_an_all_to_all_between_hosts_takes_what_deepep_publishes(ranks, measured_us):
    of = amounts(model("deepseek-v3"), hardware(AcceleratorSpec.model_validate(H800)), Parallel(tp=ranks, dp_attention=ranks, ep=ranks))
    seconds = all_to_all_s(of.ring, 128 * ranks * of.exchange_bytes, 1.0, 1.0)
    assert seconds * 1e6 == pytest.approx(measured_us, rel=0.11)


def test_a_token_goes_to_each_rank_once():
    assert other_ranks(8, 1) == 0
    assert other_ranks(1, 8) == pytest.approx(7 / 8)
    assert other_ranks(8, 8) == pytest.approx(7 * (1 - (7 / 8) ** 8))
    assert other_ranks(8, 1 << 20) == pytest.approx(8, rel=1e-4)


def test_only_what_leaves_a_host_crosses_the_network():
    assert crossing_share(hardware("h100-sxm"), 8) == 1
    assert crossing_share(hardware("h100-sxm"), 16) == pytest.approx(8 / 15)
    assert crossing_share(hardware("gb200-nvl72"), 64) == 1
