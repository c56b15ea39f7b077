"""Compiles a C++ kernel at first use and loads it by ctypes.

The kernels have a plain C interface and include no torch header, so one call of the compiler takes seconds. The library lands in
torch's extension cache under a name that hashes the sources, the compiler, its flags and this machine's CPU: another machine builds
its own. It is linked against the OpenMP runtime torch has loaded, so that one pool of threads serves both. `PDLAB_KERNELS=reference`,
or the lack of a compiler, leaves the references; `PDLAB_KERNELS=x86-64-v3` (any name that -march takes) builds for that CPU instead of this
one, so that a machine with AVX-512 can try what one without runs.
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
    compiler = _compiler()
    if compiler is None:
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
        list(pool.map(lambda source: library(source.parent.name, source), _sources()))


def unbuilt() -> list[str]:
    """The kernels that `build_all` would compile now."""
    compiler = None if os.environ.get("PDLAB_KERNELS") == "reference" else _compiler()
    try:
        return [] if compiler is None else [s.parent.name for s in _sources() if not _target(s.parent.name, s, compiler)[0].exists()]
    except (OSError, subprocess.SubprocessError):  # a compiler that does not run compiles nothing
        return []


def _sources() -> list[Path]:
    return sorted(HERE.glob("*/cpu.cpp"))


def _compiler() -> str | None:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    return compiler if compiler is not None and shutil.which(compiler) is not None else None


def _target(name: str, source: Path, compiler: str) -> tuple[Path, list[str], Path | None]:
    """Where the library belongs, the command that compiles it, and the OpenMP runtime that it is linked against."""
    runtime = _openmp_of_torch()
    command = [compiler, *FLAGS, f"-march={os.environ.get('PDLAB_KERNELS') or 'native'}", "-fopenmp", f"-I{HERE}", str(source)]
    key = hashlib.sha256()
    for text in (*command[1:-1], str(runtime), _cpu(), _version(compiler)):
        key.update(text.encode() + b"\0")
    for path in (source, *sorted(HERE.glob("*.h"))):
        key.update(path.read_bytes())
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions") / "pdlab"
    return folder / f"{name}-{key.hexdigest()[:16]}.so", command, runtime


def _built(name: str, source: Path, compiler: str) -> Path:
    target, command, runtime = _target(name, source, compiler)
    folder = target.parent
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
