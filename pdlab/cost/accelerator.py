"""An accelerator that the user writes: one of the catalogue with other figures, or all figures of a new one."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pdlab.core.strict import Strict
from pdlab.core.types import UsageError
from pdlab.cost.hardware import Hardware
from pdlab.cost.shapes import GIB

Figure = Annotated[float, Field(gt=0, allow_inf_nan=False)]
OrNone = Annotated[float, Field(ge=0, allow_inf_nan=False)]
NEEDED = ("family", "bf16_tflops", "hbm_gib", "hbm_gbytes_per_s", "pcie_gbytes_per_s", "nic_gbit_per_s")  # without `like`


class AcceleratorSpec(Strict):
    """`like` names an accelerator of the catalogue, whose figures it has where it gives none of its own. Peaks are dense, without sparsity;
    speeds are of one direction of one accelerator, in 10^9 bytes or bits a second."""

    like: str | None = None
    name: Annotated[str, Field(min_length=1, max_length=60)] | None = None
    vendor: str | None = None
    family: str | None = None
    bf16_tflops: Figure | None = None
    fp8_tflops: OrNone | None = None
    hbm_gib: Annotated[float, Field(gt=0, le=1 << 20, allow_inf_nan=False)] | None = None
    hbm_gbytes_per_s: Figure | None = None
    scaleup_gbytes_per_s: OrNone | None = None
    scaleup_domain: Annotated[int, Field(ge=1)] | None = None
    pcie_gbytes_per_s: Figure | None = None
    nic_gbit_per_s: Figure | None = None
    tdp_w: OrNone | None = None
    usd_per_h: OrNone | None = None
    source: str | None = None

    def __str__(self) -> str:
        return self.name or f"custom-{self.like}"

    def over(self, base: Hardware | None) -> Hardware:
        """The accelerator, from the one that it is like. Raises UsageError where a figure is missing, or links do not fit together."""
        if base is None:
            missing = [key for key in ("name", *NEEDED) if getattr(self, key) is None]
            if missing:
                raise UsageError(f"lacks {', '.join(missing)}: give them, or say with like which accelerator has the same")

        def figure(own: float | None, of_base: float, unit: float) -> float:
            return of_base if own is None else own * unit

        hbm_bytes = figure(self.hbm_gib, base.hbm_bytes if base else 0, GIB)
        made = Hardware(
            name=str(self),
            vendor=self.vendor or (base.vendor if base else ""),
            family=self.family or (base.family if base else ""),
            bf16_flops=figure(self.bf16_tflops, base.bf16_flops if base else 0.0, 1e12),
            fp8_flops=figure(self.fp8_tflops, base.fp8_flops if base else 0.0, 1e12),
            hbm_bytes=int(hbm_bytes),
            hbm_bytes_per_s=figure(self.hbm_gbytes_per_s, base.hbm_bytes_per_s if base else 0.0, 1e9),
            scaleup_bytes_per_s=figure(self.scaleup_gbytes_per_s, base.scaleup_bytes_per_s if base else 0.0, 1e9),
            scaleup_domain=self.scaleup_domain or (base.scaleup_domain if base else 1),
            pcie_bytes_per_s=figure(self.pcie_gbytes_per_s, base.pcie_bytes_per_s if base else 0.0, 1e9),
            nic_bytes_per_s=figure(self.nic_gbit_per_s, base.nic_bytes_per_s if base else 0.0, 1e9 / 8),
            tdp_w=figure(self.tdp_w, base.tdp_w if base else 0.0, 1.0),
            usd_per_h=figure(self.usd_per_h, base.usd_per_h if base else 0.0, 1.0),
            verified=False,
            source=self.source or "written by the user" + (f", else as {base.name}" if base else ""),
        )
        if (made.scaleup_domain > 1) != (made.scaleup_bytes_per_s > 0):
            raise UsageError(
                f"a scale-up domain of {made.scaleup_domain} and {made.scaleup_bytes_per_s / 1e9:g} GB/s do not fit together: give "
                "scaleup_domain above 1 with scaleup_gbytes_per_s, or 1 with 0"
            )
        return made
