"""`python -m pdlab.kernels.linear.bench`: GB/s of weight read, against plain reading and torch's linear."""

from __future__ import annotations

import argparse
from itertools import cycle

import torch

from pdlab.kernels import linear
from pdlab.kernels.linear import cpu
from pdlab.kernels.timing import best_s, row

SHAPES = {"SmolLM2 qkv": (960, 576), "SmolLM2 gate_up": (3072, 576), "SmolLM2 lm_head": (49152, 576), "8B gate": (14336, 4096)}
COLD_BYTES = 256 << 20  # copies of a weight to go round, so that none is found in the cache: a model's layers are as large


def read_bytes_per_s(nbytes: int) -> float:
    memory = torch.zeros(nbytes // 4)
    return nbytes / best_s(lambda: cpu.read(memory))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--vectors", type=int, nargs="*", default=[1, 4, 8])
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    peak = read_bytes_per_s(1 << 30)
    print(f"{chosen.threads} threads; plain reading of 1 GiB: {peak / 1e9:.1f} GB/s")
    for name, (out, inputs) in SHAPES.items():
        for n in chosen.vectors:
            for kind in ("float32", "bfloat16", "int8", "int4"):
                measure(f"{name} {out}x{inputs} {kind}, {n} vectors", kind, n, out, inputs, peak)


def measure(label: str, kind: str, n: int, out: int, inputs: int, peak: float) -> None:
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    size = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "int4": 0.5 + 4 / 32}[kind]
    copies = max(1, min(200, int(COLD_BYTES / (out * inputs * size))))
    plain = torch.randn(out, inputs)
    x = torch.randn(n, inputs).to(dtype)
    if kind == "int8":
        packed8 = linear.quantize_int8(plain)
        eights = cycle([linear.Int8Weight(packed8.values.clone(), packed8.scale) for _ in range(copies)])
        ours = best_s(lambda: [linear.matvec_int8(x, next(eights)) for _ in range(copies)]) / copies
    elif kind == "int4":
        packed4 = linear.quantize_int4(plain)
        fours = cycle([linear.Int4Weight(packed4.packed.clone(), packed4.scale.clone(), None, 32) for _ in range(copies)])
        ours = best_s(lambda: [linear.matvec_int4(x, next(fours)) for _ in range(copies)]) / copies
    weights = [plain.to(dtype).clone() for _ in range(max(1, min(200, COLD_BYTES // (out * inputs * dtype.itemsize))))]
    turn = cycle(weights)
    if kind in ("float32", "bfloat16"):
        ours = best_s(lambda: [linear.matvec(x, next(turn)) for _ in weights]) / len(weights)
    theirs = best_s(lambda: [torch.nn.functional.linear(x, next(turn)) for _ in weights]) / len(weights)
    rate = out * inputs * size / ours
    row(
        label,
        ours,
        f"{rate / 1e9:8.1f} GB/s",
        f"{rate / peak:6.0%} of reading",
        f"torch {theirs * 1e3:8.3f} ms",
        f"{theirs / ours:6.2f} x torch",
    )


if __name__ == "__main__":
    main()
