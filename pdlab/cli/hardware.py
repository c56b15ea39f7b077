"""`pdlab hardware`."""

from __future__ import annotations

from pdlab.cli.listing import plain
from pdlab.cli.shared import HardwareFile, out
from pdlab.cost import hardware as find
from pdlab.cost import hardware_names
from pdlab.cost.accelerator import AcceleratorSpec
from pdlab.experiment.hardware_file import read_accelerators


def hardware(hardware_file: HardwareFile = None) -> None:
    """The accelerators known by name. Unverified figures were recalled, not read from a primary source."""
    written = {} if hardware_file is None else read_accelerators(hardware_file)
    own = [find(AcceleratorSpec.model_validate(figures)) for figures in written.values()]
    table = plain("accelerator", "vendor", "memory", "bandwidth", "bf16 peak", "NIC", "", right=(2, 3, 4, 5))
    for h in [*own, *(find(name) for name in hardware_names())]:
        figures = (f"{h.hbm_bytes / 2**30:,.0f} GiB", f"{h.hbm_bytes_per_s / 1e12:.2f} TB/s", f"{h.bf16_flops / 1e12:,.0f} TFLOP/s")
        table.add_row(h.name, h.vendor, *figures, f"{h.nic_bytes_per_s / 1e9:g} GB/s", "" if h.verified else "unverified")
    out.print(table)
