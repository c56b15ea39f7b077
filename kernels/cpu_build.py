"""Compiles a C++ kernel at first use and loads it by ctypes.

The kernels have a plain C interface and include no torch header, so one call of the compiler takes seconds. The library lands in
torch's extension cache under a name that hashes the sources, the compiler, its flags and this machine's CPU: another machine builds
its own. It is linked against the OpenMP runtime torch has loaded, so that one pool of threads serves both. `PDLAB_KERNELS=reference`,
or the lack of a compiler, leaves the references.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

log = logging.getLogger(__name__)

HERE = Path(__file__).parent
FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fPIC",
    "-shared",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wno-psabi",
)


@cache
def library(name: str, source: Path) -> ctypes.CDLL | None:
    """The library compiled from `source`, or None (said once in the log) where the reference must serve."""
    if os.environ.get("PDLAB_KERNELS") == "reference":
        log.warning("PDLAB_KERNELS=reference: %s runs in plain PyTorch", name)
        return None
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None or shutil.which(compiler) is None:
        log.warning("no C++ compiler (c++, g++ or $CXX): %s runs in plain PyTorch, slowly", name)
        return None
    try:
        return ctypes.CDLL(str(_built(name, source, compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("%s did not compile and runs in plain PyTorch, slowly: %s", name, (getattr(error, "stderr", None) or str(error))[:1000])
        return None


def build_all() -> None:
    """Compile every kernel that is not in the cache, side by side."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda source: library(source.parent.name, source), sorted(HERE.glob("*/cpu.cpp"))))


def _built(name: str, source: Path, compiler: str) -> Path:
    runtime = _openmp_of_torch()
    command = [compiler, *FLAGS, "-fopenmp", f"-I{HERE}", str(source)]
    key = hashlib.sha256()
    for text in (*command[1:-1], str(runtime), _cpu(), _version(compiler)):
        key.update(text.encode() + b"\0")
    for path in (source, *sorted(HERE.glob("*.h"))):
        key.update(path.read_bytes())
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions") / "pdlab"
    target = folder / f"{name}-{key.hexdigest()[:16]}.so"
    if target.exists():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="pdlab-kernels-"))
        target = folder / target.name
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # let go by the kernel should the builder die
        if not target.exists():
            part = target.with_suffix(f".{os.getpid()}")
            # the object is linked without -fopenmp: that would bring the compiler's own runtime beside torch's
            subprocess.run([*command[:-1], "-c", "-o", f"{part}.o", str(source)], check=True, capture_output=True, text=True, timeout=300)
            link = ["-Wl,--no-as-needed", str(runtime), "-pthread"] if runtime else ["-fopenmp"]
            subprocess.run(
                [compiler, "-shared", "-o", str(part), f"{part}.o", *link], check=True, capture_output=True, text=True, timeout=300
            )
            Path(f"{part}.o").unlink()
            part.replace(target)
    return target


def _openmp_of_torch() -> Path | None:
    """The libgomp that torch brought, else (a torch built against the system's, or by clang) none."""
    root = Path(torch.__file__).parent
    found = [path for folder in (root / "lib", root.parent / "torch.libs") for path in sorted(folder.glob("libgomp*.so*"))]
    return found[0] if found else None


@cache
def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
        kept = [
            line for line in lines if line.split("\t")[0].strip() in ("model name", "flags", "Features", "CPU part", "cpu family", "model")
        ]
        return platform.machine() + "\n".join(kept)
    except OSError:
        return platform.machine() + platform.processor()


@cache
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True, timeout=30).stdout.splitlines()[0]
