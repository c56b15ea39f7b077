"""`pdlab hardware`."""

from __future__ import annotations

from pdlab.cli.listing import plain
from pdlab.cli.shared import out
from pdlab.cost import hardware as find
from pdlab.cost import hardware_names


def hardware() -> None:
    """The accelerators known by name. Unverified figures were recalled, not read from a primary source."""
    table = plain("accelerator", "vendor", "memory", "bandwidth", "bf16 peak", "NIC", "", right=(2, 3, 4, 5))
    for name in hardware_names():
        h = find(name)
        figures = (f"{h.hbm_bytes / 2**30:,.0f} GiB", f"{h.hbm_bytes_per_s / 1e12:.2f} TB/s", f"{h.bf16_flops / 1e12:,.0f} TFLOP/s")
        table.add_row(name, h.vendor, *figures, f"{h.nic_bytes_per_s / 1e9:g} GB/s", "" if h.verified else "unverified")
    out.print(table)
