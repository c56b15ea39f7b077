"""A machine with a GPU, where there is none: the driver's calls go to fake_cuda.cpp, and GPU memory is the CPU's."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from pdlab.kernels.cpu_build import library
from pdlab.real.transfer.cuda_ipc import Driver

ALLOCATION = "allocation"  # the attribute by which a tensor of `memory` carries what the fake driver can export


def fake() -> ctypes.CDLL | None:
    """None: there is no compiler."""
    found = library("fake_cuda", Path(__file__).with_name("fake_cuda.cpp"))
    if found is not None:
        found.fake_allocation.argtypes = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int]
    return found


def driver(kv: torch.Tensor) -> Driver:
    """Of the GPU that `kv` is said to be on."""
    found, segment = _fake(), getattr(kv, ALLOCATION)
    found.fake_allocation(segment.address, segment.bytes, segment.fd)
    return Driver(0, found._name)


def opened() -> int:
    """Allocations of others that this process has mapped."""
    return int(_fake().fake_opened())


def refuse(code: int) -> None:
    """Whatever this process opens from now on fails with this error of CUDA; 0: no more."""
    _fake().fake_refusal(code)


def _fake() -> ctypes.CDLL:
    found = fake()
    assert found is not None, "the tests that come here are skipped without a compiler"
    return found
