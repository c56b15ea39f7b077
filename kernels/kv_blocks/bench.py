"""`python -m pdlab.kernels.kv_blocks.bench`: GB/s gathered and scattered, against index_select and index_copy."""

from __future__ import annotations

import argparse

import torch

from pdlab.kernels.kv_blocks import gather_blocks, reference, scatter_blocks
from pdlab.kernels.timing import best_s, row

SHAPES = {"SmolLM2-135M": (30, 3, 64, 4096), "Llama-3.1-8B": (32, 8, 128, 256)}  # layers, kv_heads, head_dim, blocks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    print(f"{chosen.device}, {chosen.threads} threads; bfloat16, blocks of 16 tokens; GB/s count what is copied once")
    for model, (layers, kv_heads, dim, blocks) in SHAPES.items():
        kv = torch.zeros(layers, 2, blocks, kv_heads, 16, dim, dtype=torch.bfloat16, device=chosen.device)
        for count in (4, 64, 128):
            ids = torch.randperm(blocks, device=chosen.device)[:count]
            buffer = gather_blocks(kv, ids)
            size = buffer.numel() * 2 / 1e9
            for name, ours, theirs in (
                ("gather", lambda: gather_blocks(kv, ids, buffer), lambda: reference.gather_blocks(kv, ids, buffer)),  # noqa: B023
                ("scatter", lambda: scatter_blocks(buffer, kv, ids), lambda: reference.scatter_blocks(buffer, kv, ids)),  # noqa: B023
            ):
                a, b = best_s(ours, device=chosen.device), best_s(theirs, device=chosen.device)
                row(f"{model} {name} of {count} blocks", a, f"{size / a:8.1f} GB/s", f"torch {b * 1e3:8.3f} ms", f"{b / a:6.2f} x torch")


if __name__ == "__main__":
    main()
