"""`python -m pdlab.kernels.decode.bench`: a decode step of a model of SmolLM2-135M's sizes, against the same in plain PyTorch."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from pdlab.kernels.decode import DecodeStep, Weight, available
from pdlab.kernels.decode.reference import PlainDecodeStep
from pdlab.kernels.linear import quantize_int4, quantize_int8
from pdlab.kernels.timing import best_s, row

LAYERS, HIDDEN, HEADS, KV_HEADS, DIM, FFN, BLOCK_TOKENS = 30, 576, 9, 3, 64, 1536, 16
SHAPES = (((HEADS + 2 * KV_HEADS) * DIM, HIDDEN), (HIDDEN, HEADS * DIM), (2 * FFN, HIDDEN), (HIDDEN, FFN))  # qkv, out, gate_up, down
WEIGHTS = LAYERS * sum(out * inputs for out, inputs in SHAPES)
BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "int4": 0.5 + 4 / 32}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--sequences", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--context", type=int, default=256)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    if not available(torch.bfloat16):
        raise SystemExit("no C++ compiler: the compiled decode step is not to be had")
    print(f"{chosen.threads} threads; {LAYERS} layers, {WEIGHTS / 1e6:.0f} M weights; {chosen.context} tokens of context each")
    for kind in BYTES:
        for sequences in chosen.sequences:
            compare(kind, sequences, chosen.context)


def compare(kind: str, sequences: int, context: int) -> None:
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    sizes = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": DIM, "hidden": HIDDEN, "ffn": FFN, "eps": 1e-5, "dtype": dtype}
    ours, theirs = DecodeStep(**sizes), PlainDecodeStep(**sizes)
    blocks = -(-context // BLOCK_TOKENS)
    for _ in range(LAYERS):
        linears = [(stored(kind, torch.randn(shape) / shape[1] ** 0.5), None) for shape in SHAPES]
        norms = [torch.ones(HIDDEN, dtype=dtype), torch.ones(HIDDEN, dtype=dtype), None, None]
        cache = torch.randn(2, sequences * blocks, KV_HEADS, BLOCK_TOKENS, DIM).to(dtype)
        for step in (ours, theirs):
            step.add_layer(linears, norms, (cache[0], cache[1]), 0)
    inputs = step_inputs(sequences, context, blocks)
    embeddings = torch.randn(sequences, HIDDEN).to(dtype)
    a, b = (best_s(lambda step=step: step(embeddings.clone(), *inputs)) for step in (ours, theirs))
    rate = WEIGHTS * BYTES[kind] / a / 1e9
    row(f"{kind}, {sequences} sequences", a, f"{rate:8.1f} GB/s", f"plain {b * 1e3:8.2f} ms", f"{b / a:6.2f} x plain")


def stored(kind: str, weight: Tensor) -> Weight:
    if kind == "int8":
        return quantize_int8(weight)
    return quantize_int4(weight) if kind == "int4" else weight.to(torch.float32 if kind == "float32" else torch.bfloat16)


def step_inputs(sequences: int, context: int, blocks: int) -> tuple[Tensor, ...]:
    """The last token of each sequence, whose blocks follow one another."""
    tables = torch.arange(sequences * blocks, dtype=torch.int32).view(sequences, blocks)
    positions = torch.full((sequences,), context - 1)
    slots = tables[:, -1].long() * BLOCK_TOKENS + (context - 1) % BLOCK_TOKENS
    angle = torch.arange(float(context))[:, None] / 10000 ** (torch.arange(DIM // 2) * 2 / DIM)
    starts = torch.arange(sequences + 1, dtype=torch.int32)
    return positions, slots, tables, starts, torch.full((sequences,), context, dtype=torch.int32), angle.cos(), angle.sin()


if __name__ == "__main__":
    main()
