"""`python -m pdlab.kernels.fused.bench`: microseconds of the small steps at SmolLM2-135M's sizes, against PyTorch's ways to do them."""

from __future__ import annotations

import argparse

import torch

from pdlab.kernels.fused import reference, rms_norm, rope, silu_and_mul
from pdlab.kernels.timing import best_s, row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    torch.set_num_threads(parser.parse_args().threads)
    angle = torch.arange(8192.0)[:, None] / 10000 ** (torch.arange(32) / 32)
    cos, sin = angle.cos(), angle.sin()
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in (1, 16, 1024):
            compare(dtype, tokens, cos, sin)


def compare(dtype: torch.dtype, tokens: int, cos: torch.Tensor, sin: torch.Tensor) -> None:
    x, weight, residual = torch.randn(tokens, 576).to(dtype), torch.ones(576, dtype=dtype), torch.zeros(tokens, 576, dtype=dtype)
    gate_up = torch.randn(tokens, 3072).to(dtype)
    q, k = torch.randn(tokens, 15 * 64).to(dtype).unflatten(1, (15, 64)).split([9, 6], 1)
    k, positions = k[:, :3], torch.arange(tokens)
    for name, ours, theirs, elements in (
        (
            "rms_norm with residual",
            lambda: rms_norm(x, weight, 1e-5, residual),
            lambda: torch.nn.functional.rms_norm(residual.add_(x), (576,), weight, 1e-5),
            4 * x.numel(),
        ),
        ("silu_and_mul", lambda: silu_and_mul(gate_up), lambda: glu(gate_up), 3 * gate_up.numel() // 2),
        (
            "rope",
            lambda: rope(q, k, positions, cos, sin),
            lambda: reference.rope(q, k, positions, cos, sin),
            2 * (q.numel() + k.numel()),
        ),
    ):
        a, b = best_s(ours, budget_s=0.3), best_s(theirs, budget_s=0.3)
        rate = elements * dtype.itemsize / a / 1e9
        label = f"{name} of {tokens} tokens {str(dtype).removeprefix('torch.')}"
        row(label, a, f"{rate:8.1f} GB/s", f"torch {b * 1e3:8.4f} ms", f"{b / a:6.2f} x torch")


def glu(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


if __name__ == "__main__":
    main()
