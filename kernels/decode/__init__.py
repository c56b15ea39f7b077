"""A decode step of few sequences, all layers in one call (CPU only): at 10 ms a step, Python between 300 kernel calls is a quarter of it.

It calls the other folders' compiled kernels and computes nothing itself; the reference calls their references, layer by layer.
"""

from __future__ import annotations

from pdlab.kernels.decode.cpu import DecodeStep, Weight, available

__all__ = ["DecodeStep", "Weight", "available"]
