"""What a cost model needs to know of an accelerator.

Vendors' "GB" of device memory are GiB in what the driver reports, so one is 2**30 bytes here; link and memory speeds are decimal.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pdlab.cost.dtypes import EIGHT_BIT, FOUR_BIT
from pdlab.cost.profile import InstanceProfile


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """One accelerator. Peaks are dense, without sparsity; link speeds are for one direction of one accelerator; 0 where it has none."""

    name: str
    vendor: str
    family: str  # whose calibrated fractions it takes: a100, h100, ...
    bf16_flops: float  # 1/s
    fp8_flops: float  # 1/s, 0 without 8-bit units; int8 is taken to be as fast
    hbm_bytes: int
    hbm_bytes_per_s: float
    scaleup_bytes_per_s: float  # NVLink, HCCS, Infinity Fabric
    scaleup_domain: int  # accelerators that reach one another over it
    pcie_bytes_per_s: float
    nic_bytes_per_s: float  # as typically fitted
    tdp_w: float
    usd_per_h: float  # rough
    verified: bool
    source: str
    profile: InstanceProfile | None = field(default=None, repr=False)  # measured: its steps are timed, and not computed from the above

    def flops(self, dtype: str) -> float:
        """Peak operations a second for weights of this format. Blackwell multiplies nvfp4 twice as fast as fp8, and mxfp4 with activations
        in eight bits; elsewhere both are widened to bf16, as four-bit integers are anywhere. fp32 runs as TF32."""
        if dtype in EIGHT_BIT and self.fp8_flops:
            return self.fp8_flops
        if dtype in FOUR_BIT and self.family == "blackwell":
            return self.fp8_flops * (2 if dtype == "nvfp4" else 1)
        return self.bf16_flops / 2 if dtype == "fp32" else self.bf16_flops

    def link_bytes_per_s(self, tp: int) -> float:
        """One direction of the link that `tp` ranks' collectives cross: scale-up inside its domain, PCIe in a host of 8, NIC beyond."""
        if tp <= self.scaleup_domain and self.scaleup_bytes_per_s:
            return self.scaleup_bytes_per_s
        return self.pcie_bytes_per_s if tp <= 8 else self.nic_bytes_per_s

    @classmethod
    def measured(cls, profile: InstanceProfile) -> Hardware:
        """An instance that was calibrated, as an accelerator. It has only memory and links, since its steps are timed, not computed;
        without a measured transfer 10 GB/s."""
        link_bytes_per_s = profile.transfer.bytes_per_s if profile.transfer is not None else 10e9
        return cls(
            name=profile.name,
            vendor="",
            family="measured",
            bf16_flops=0.0,
            fp8_flops=0.0,
            hbm_bytes=profile.machine.memory_bytes,
            hbm_bytes_per_s=0.0,
            scaleup_bytes_per_s=0.0,
            scaleup_domain=1,
            pcie_bytes_per_s=link_bytes_per_s,
            nic_bytes_per_s=link_bytes_per_s,
            tdp_w=0.0,
            usd_per_h=0.0,
            verified=True,
            source=f"pdlab calibrate, {profile.made_at}, {profile.machine.cpu}",
            profile=profile,
        )
