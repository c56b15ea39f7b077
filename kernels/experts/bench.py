"""`python -m pdlab.kernels.experts.bench`: GB/s of the chosen experts' weights, against plain reading."""

from __future__ import annotations

import argparse
from functools import partial

import torch
from torch import Tensor

from pdlab.kernels.decode.reference import Weight
from pdlab.kernels.experts import ExpertWeights, GroupedExperts
from pdlab.kernels.linear import Fp8Weight, Int4Weight, Int8Weight, Mxfp4Weight, quantize_int4, quantize_int8
from pdlab.kernels.linear.bench import read_bytes_per_s
from pdlab.kernels.timing import best_s, row

SHAPES = {  # experts, of them chosen, width, hidden
    "Qwen3-30B-A3B": (128, 8, 768, 2048),
    "Mixtral-8x7B": (8, 2, 14336, 4096),
    "DeepSeek-V2-Lite": (64, 6, 1408, 2048),
    "tiny": (8, 2, 64, 128),
}
KINDS = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "int4": 0.5 + 4 / 32, "fp8": 1.0, "mxfp4": 0.5 + 1 / 32}  # bytes a weight
ON_CPU = ("float32", "bfloat16", "int8", "int4")  # the others are widened there


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 4, 8])
    parser.add_argument("--kinds", nargs="*", choices=list(KINDS))
    parser.add_argument("--models", nargs="*", default=[name for name in SHAPES if name != "tiny"], choices=list(SHAPES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=0.6, help="for each row")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    device = torch.device(chosen.device)
    peak = read_bytes_per_s(1 << (26 if chosen.models == ["tiny"] else 30)) if device.type == "cpu" else _device_bytes_per_s(device)
    print(f"{chosen.threads} threads; plain reading: {peak / 1e9:.1f} GB/s")
    for name in chosen.models:
        for kind in chosen.kinds or (ON_CPU if device.type == "cpu" else tuple(KINDS)[1:]):
            measure(name, kind, chosen.tokens, peak, device, chosen.seconds)


def measure(name: str, kind: str, tokens: list[int], peak: float, device: torch.device, seconds: float) -> None:
    count, per_token, width, hidden = SHAPES[name]
    with device:
        experts = GroupedExperts(_experts(kind, count, width, hidden), hidden, width)
    for n in tokens:
        x = torch.randn(n, hidden, device=device).to(torch.float32 if kind == "float32" else torch.bfloat16)
        picks = [torch.stack([torch.randperm(count)[:per_token] for _ in range(n)]).to(device) for _ in range(16)]
        read = sum(len(ids.unique()) for ids in picks) / len(picks) * 3 * width * hidden * KINDS[kind]
        took = best_s(partial(_round, experts, x, picks), budget_s=seconds, device=device.type) / len(picks)
        row(f"{name} {kind}, {n} tokens", took, f"{read / took / 1e9:8.1f} GB/s", f"{read / took / peak:6.0%} of reading")


def _round(experts: GroupedExperts, x: Tensor, picks: list[Tensor]) -> None:
    weights = torch.full(picks[0].shape, 1 / picks[0].shape[1], device=x.device)
    for ids in picks:
        experts(x, ids, weights)


def _device_bytes_per_s(device: torch.device) -> float:
    """Of a sum over what no cache holds."""
    memory = torch.ones(1 << 30, device=device)
    return memory.nbytes / best_s(lambda: memory.sum().item())


def _experts(kind: str, count: int, width: int, hidden: int) -> list[ExpertWeights]:
    """One expert, copied, so that each lies elsewhere."""
    pair = [_weight(kind, out, inputs) for out, inputs in ((2 * width, hidden), (hidden, width))]
    return [((_copy(pair[0]), None), (_copy(pair[1]), None)) for _ in range(count)]


def _weight(kind: str, out: int, inputs: int) -> Weight:
    if kind == "mxfp4":
        return Mxfp4Weight(torch.full((out, inputs // 2), 0x32, dtype=torch.uint8), torch.full((out, inputs // 32), 120, dtype=torch.uint8))
    weight = torch.empty(out, inputs).uniform_(-0.05, 0.05)
    if kind == "fp8":
        return Fp8Weight(weight.to(torch.float8_e4m3fn), torch.ones(-(-out // 128), -(-inputs // 128)), (128, 128))
    if kind == "int8":
        return quantize_int8(weight)
    if kind == "int4":
        return quantize_int4(weight)
    return weight.to(torch.float32 if kind == "float32" else torch.bfloat16)


def _copy(weight: Weight) -> Weight:
    if isinstance(weight, Int8Weight):
        return Int8Weight(weight.values.clone(), weight.scale.clone())
    if isinstance(weight, Int4Weight):
        return Int4Weight(weight.packed.clone(), weight.scale.clone(), None, weight.group)
    if isinstance(weight, Fp8Weight):
        return Fp8Weight(weight.values.clone(), weight.scale.clone(), weight.block)
    if isinstance(weight, Mxfp4Weight):
        return Mxfp4Weight(weight.packed.clone(), weight.scale.clone())
    return weight.clone()


if __name__ == "__main__":
    main()
