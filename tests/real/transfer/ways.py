"""Transports that not every machine has, as parameters of tests."""

from __future__ import annotations

import pytest

from pdlab.real.transfer import nixl
from tests.real.transfer import gpu

NIXL = pytest.param("nixl", marks=pytest.mark.skipif(nixl.api() is None, reason="NIXL is not installed (pip install nixl-cu12)"))
CUDA_IPC = pytest.param("cuda_ipc", marks=pytest.mark.skipif(gpu.fake() is None, reason="no C++ compiler for the fake CUDA driver"))
