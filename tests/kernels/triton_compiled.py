"""Compiles every Triton kernel for an H100 or H200 (sm_90), with no GPU: each launch that the wrappers make is compiled, and not run.

Prints a line for each, and "well" where none asks for more shared memory than there is."""

from __future__ import annotations

import inspect
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

from pdlab.kernels.decode.reference import Weight
from pdlab.kernels.experts import Activation
from pdlab.kernels.experts import cuda as experts
from pdlab.kernels.fused import cuda as fused
from pdlab.kernels.kv_blocks import cuda as blocks
from pdlab.kernels.linear import Fp8Weight, Int4Weight, Int8Weight, Mxfp4Weight
from pdlab.kernels.paged_attention import cuda as attention

E4M3 = torch.float8_e4m3fn
TARGET = GPUTarget("cuda", 90, 32)
SHARED_BYTES = 227 << 10  # that a program may have there
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
    E4M3: "fp8e4nv",
}
OPTIONS = ("num_warps", "num_stages")
CALLED = ("_tile", "_rows", "_narrowed", "_widened", "_products")  # by kernels, and never launched


class CompiledOnly:
    """In a kernel's place: a launch compiles it, once for each set of types and constants."""

    def __init__(self, kernel: JITFunction[Any]) -> None:
        self.kernel = kernel
        self.seen: set[str] = set()

    def __getitem__(self, grid: object) -> CompiledOnly:
        return self

    def __call__(self, *args: Any, **named: Any) -> None:
        options = {name: named.pop(name) for name in OPTIONS if name in named}
        given = inspect.signature(self.kernel.fn).bind(*args, **named).arguments
        constants = {
            p.name: given[p.name] for p in self.kernel.params if p.is_constexpr or (type(given[p.name]) is int and given[p.name] == 1)
        }
        signature = {name: "constexpr" if name in constants else kind(value) for name, value in given.items()}
        aligned = {
            (at,): [["tt.divisibility", 16]] for at, (name, value) in enumerate(given.items()) if name not in constants and even(value)
        }
        if (key := f"{signature} {constants} {aligned} {options}") in self.seen:
            return
        self.seen.add(key)
        made = triton.compile(ASTSource(self.kernel, signature, constants, aligned), target=TARGET, options=options)
        shared, spilled = made.metadata.shared, spills(made.asm["cubin"])
        print(f"{self.kernel.__name__} {constants}: {shared / 1024:.0f} KiB shared, {spilled}")
        assert shared <= SHARED_BYTES, f"{self.kernel.__name__} {constants} asks for {shared} bytes of shared memory"


def kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"*{TYPES[value.dtype]}"
    return "fp32" if isinstance(value, float) else "i32"


def even(value: Any) -> bool:
    """What a launch tells the compiler of pointers that torch gives out, and of multiples of 16."""
    return isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)


def spills(cubin: bytes) -> str:
    """What cuobjdump says of registers and of the stack, which spilled registers lie on."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        return "no cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return " ".join(word for word in said.split() if word.startswith(("REG:", "STACK:")))


def replace(module: ModuleType) -> None:
    for name, value in list(vars(module).items()):
        if isinstance(value, JITFunction) and name not in CALLED:
            setattr(module, name, CompiledOnly(value))


def attend(
    heads: int,
    kv_heads: int,
    dim: int,
    dtype: torch.dtype,
    *,
    one: bool = False,
    sinks: bool = False,
    window: int = 0,
    stored: torch.dtype | None = None,
) -> None:
    q = torch.empty(40, heads, dim, dtype=dtype)
    keys, values = (torch.empty(64, kv_heads, 16, dim, dtype=stored or dtype) for _ in range(2))
    tables, contexts = torch.zeros(3, 64, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    starts = torch.zeros(4, dtype=torch.int32)
    kept = torch.empty(heads) if sinks else None
    attention.paged_attention(q, keys, keys if one else values, tables, starts, contexts, scale=0.1, window=window, sinks=kept)
    part = torch.empty(40, kv_heads, dim, dtype=dtype)
    attention.store_kv(part, part, keys, values, torch.zeros(40, dtype=torch.int64))


def stored(kind: str, out: int, inputs: int, dtype: torch.dtype) -> Weight:
    match kind:
        case "int8":
            return Int8Weight(torch.empty(out, inputs, dtype=torch.int8), torch.empty(out))
        case "int4":
            return Int4Weight(torch.empty(out, inputs // 2, dtype=torch.uint8), torch.empty(out, inputs // 32), None, 32)
        case "fp8":
            return Fp8Weight(torch.empty(out, inputs, dtype=torch.float8_e4m3fn), torch.empty(out // 128, inputs // 128), (128, 128))
        case "mxfp4":
            packed, scale = (torch.empty(out, inputs // each, dtype=torch.uint8) for each in (2, 32))
            return Mxfp4Weight(packed, scale)
        case _:
            return torch.empty(out, inputs, dtype=dtype)


def main() -> None:
    for module in (attention, blocks, experts, fused):
        replace(module)
    attend(32, 8, 128, torch.bfloat16)
    attend(9, 3, 64, torch.float32)
    attend(64, 8, 64, torch.bfloat16, sinks=True, window=128)
    attend(16, 8, 256, torch.bfloat16)
    attend(32, 2, 80, torch.float16)
    attend(128, 1, 576, torch.bfloat16, one=True)
    attend(16, 1, 576, torch.float32, one=True)
    attend(32, 8, 128, torch.bfloat16, stored=E4M3)
    attend(32, 8, 128, torch.float16, stored=E4M3, sinks=True, window=128)
    attend(128, 1, 576, torch.bfloat16, one=True, stored=E4M3)
    blocks.copy_blocks(torch.empty(2, 2, 4, 8, 16, 128), torch.empty(2, 2, 2, 8, 16, 128), torch.zeros(2, dtype=torch.int32), (0, 2), True)
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.empty(33, 4096, dtype=dtype)
        fused.rms_norm(x, x[0], 1e-5, x.clone())
        fused.silu_and_mul(x)
        qk = x.view(33, 32, 128)
        fused.rope(qk, qk[:, :8], torch.zeros(33, dtype=torch.int64), torch.empty(64, 64), torch.empty(64, 64))
        for kind in ("plain", "int8", "int4", "fp8", "mxfp4")[: 5 if dtype == torch.bfloat16 else 1]:
            each = [((stored(kind, 1536, 2048, dtype), None), (stored(kind, 2048, 768, dtype), None)) for _ in range(4)]
            where = experts.ExpertPointers(each)
            for tokens in (2, 400):
                ids = torch.zeros(tokens, 2, dtype=torch.int64)
                experts.experts(torch.empty(tokens, 2048, dtype=dtype), ids, ids.float(), where, 768, Activation(1.7, 7.0, 1.0))
    print("well")


if __name__ == "__main__":
    sys.exit(main())
