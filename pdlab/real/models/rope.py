"""Rotary position tables, scaled as the model asks. Sources: RoFormer §3.4; YaRN §3 (linear, NTK by parts); Llama 3.1's config."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pdlab.real.models.config import RopeConfig


def frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Radians a position, float32 [head_dim / 2]."""
    base = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if rope.scaling == "linear":
        return base / rope.factor
    if rope.scaling == "llama3":
        return _by_wavelength(base, rope)
    if rope.scaling == "yarn":
        return _by_parts(base, rope, head_dim)
    return base


def tables(rope: RopeConfig, head_dim: int, positions: int, factors: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(cos, sin), float32 [positions, head_dim / 2]. `factors` divide the frequencies (a GGUF's own scaling)."""
    freqs = frequencies(rope, head_dim)
    if factors is not None:
        freqs = freqs / factors
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), freqs)
    return angles.cos() * rope.attention_factor, angles.sin() * rope.attention_factor


def _by_wavelength(base: Tensor, rope: RopeConfig) -> Tensor:
    """Long wavelengths are stretched, short ones kept, those between blended."""
    turns = rope.original_positions * base / (2 * math.pi)  # over the original context
    keep = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return keep * base + (1 - keep) * base / rope.factor


def _by_parts(base: Tensor, rope: RopeConfig, head_dim: int) -> Tensor:
    def dimension(turns: float) -> float:
        return head_dim * math.log(rope.original_positions / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    return base / rope.factor * ramp + base * (1 - ramp)
