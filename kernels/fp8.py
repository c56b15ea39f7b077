"""float8_e4m3fn, which KV may be kept in: a sign, 4 bits of exponent, 3 of mantissa. The C++ of it is fp8.h."""

from __future__ import annotations

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
MOST = 448.0  # its largest


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """To the nearest of another dtype; beyond the largest of float8, which has no infinity, the largest."""
    return values.float().clamp(-MOST, MOST).to(dtype) if dtype == E4M3 != values.dtype else values.to(dtype)
