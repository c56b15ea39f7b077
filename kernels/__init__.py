"""Kernels, shipped as `pdlab.kernels`: one folder each, holding the kernel, its plain PyTorch reference, and a benchmark.

Empty for now: the simulator needs none.
"""
