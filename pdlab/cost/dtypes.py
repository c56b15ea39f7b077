"""Number formats: how many bytes a value takes, and which of an accelerator's peaks computes it."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

from pdlab.core.types import UsageError

# Four-bit formats carry their scales: one bf16 for 128 weights (wint4), one byte for 32 (mxfp4) or 16 (nvfp4). Of wint8, wint4, wint3 and
# wint2 only the weights are quantised: they are widened before they are multiplied.
BYTES = {
    "fp32": 4.0,
    "bf16": 2.0,
    "fp16": 2.0,
    "fp8": 1.0,
    "int8": 1.0,
    "mxfp8": 1.03125,
    "wint8": 1.0,
    "mxfp6": 0.78125,
    "wint4": 0.515625,
    "mxfp4": 0.53125,
    "nvfp4": 0.5625,
    "wint3": 0.390625,
    "wint2": 0.265625,
}
EIGHT_BIT = frozenset({"fp8", "int8", "mxfp8"})
FOUR_BIT = frozenset({"nvfp4", "mxfp4"})


def dtype_bytes(dtype: str) -> float:
    """Bytes of one value, quantisation scales included. Raises UsageError on an unknown format."""
    size = BYTES.get(dtype)
    if size is None:
        near = get_close_matches(dtype, BYTES, n=1, cutoff=0.3)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(BYTES)}"
        raise UsageError(f"unknown number format {dtype!r}: {hint}")
    return size


@dataclass(frozen=True, slots=True)
class Format:
    """How some weights are stored. `bytes_per_value` has their scales and zero points in it; `compute` is the format whose peak counts:
    weights whose activations stay in 16 bits are widened to bf16 before they are multiplied, and so is a format that the accelerator does
    not multiply."""

    dtype: str
    bytes_per_value: float
    compute: str

    @property
    def is_quantised(self) -> bool:
        return self.bytes_per_value < 2.0


def plain(dtype: str) -> Format:
    """A format as its name alone has it: integers of four bits and less are widened to bf16. Raises UsageError on an unknown one."""
    return Format(dtype, dtype_bytes(dtype), dtype if dtype in (*EIGHT_BIT, *FOUR_BIT, "fp32") else "bf16")
