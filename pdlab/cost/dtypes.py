"""Number formats: how many bytes a value takes, and which of an accelerator's peaks computes it."""

from __future__ import annotations

from difflib import get_close_matches

from pdlab.types import UsageError

# Four-bit formats carry their scales: one bf16 for 128 weights (wint4), one byte for 32 (mxfp4).
BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "int8": 1.0, "wint4": 0.515625, "mxfp4": 0.53125}
EIGHT_BIT = frozenset({"fp8", "int8"})


def dtype_bytes(dtype: str) -> float:
    """Bytes of one value, quantisation scales included. Raises UsageError on an unknown format."""
    size = BYTES.get(dtype)
    if size is None:
        near = get_close_matches(dtype, BYTES, n=1, cutoff=0.3)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(BYTES)}"
        raise UsageError(f"unknown number format {dtype!r}: {hint}")
    return size
