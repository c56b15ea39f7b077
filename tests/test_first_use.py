"""Decoders that msgspec builds for a type on first use: in two threads at once that has crashed processes, so all are made at import."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pdlab

PACKAGE = Path(pdlab.__file__).parent
PROCESSES, THREADS = 24, 16
FIRST = """
import os, sys, threading
sys.setswitchinterval(1e-6)
from pdlab.real.transfer import descriptor
from pdlab.real.transfer.descriptor import Descriptor, Geometry, Shm, Tcp
geometry = Geometry(2, 2, 16, 8, "float32", "m")
raw = Descriptor("a", "1", "h", geometry, 8, Tcp("127.0.0.1", 1), Shm("s", True)).encode()
def first():
    start.wait()
    for _ in range(3):
        assert descriptor.decode(raw).name == "a"
for _ in range(%d):
    if child := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        continue
    start, left = threading.Barrier(%d), []
    threads = [threading.Thread(target=lambda: left.append(first())) for _ in range(%d)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    os._exit(0 if left == [None] * len(threads) else 1)
"""


def test_threads_that_decode_first_at_once_all_live() -> None:
    """In processes that were forked once all was imported: each decodes for the first time."""
    code = FIRST % (PROCESSES, THREADS, THREADS)
    end = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert end.stdout.split() == ["0"] * PROCESSES


def _lazily_built(tree: ast.Module) -> list[int]:
    """Lines within functions that decode or convert to a type, or make a decoder: each may be the first use of its type."""
    lines = []
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        for call in ast.walk(function):
            if not isinstance(call, ast.Call):
                continue
            name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            typed = any(keyword.arg == "type" for keyword in call.keywords) or len(call.args) > 1
            msgspecs = "msgspec" in ast.unparse(call.func)
            if msgspecs and (name == "convert" or (name == "Decoder" and call.args) or (name == "decode" and typed)):
                lines.append(call.lineno)
    return sorted(set(lines))


# Parameters of a policy or a batching, whose types its own class names, and a log that is played by a command.
IN_ONE_THREAD = {"batching/__init__.py": 1, "policies/load.py": 1, "search/tune_space.py": 1, "replay/scheduler_log.py": 2}


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_decoder_is_built_on_first_use(file: Path) -> None:
    lines = _lazily_built(ast.parse(file.read_text(encoding="utf-8")))
    assert len(lines) == IN_ONE_THREAD.get(str(file.relative_to(PACKAGE)), 0), f"{file}, lines {lines}: make the decoder at module level"
