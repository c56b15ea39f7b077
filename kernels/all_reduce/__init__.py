"""Sums and gathers over the ranks of one host, by memory that all of them map. Compiled, for CPUs; without a compiler there is none, and
the ranks' process group does them."""

from pdlab.kernels.all_reduce.cpu import SharedSum, available

__all__ = ["SharedSum", "available"]
