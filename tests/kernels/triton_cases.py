"""What the Triton kernels must do: run under TRITON_INTERPRET=1 on a CPU, or plainly on CUDA, by test_triton.py and by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from test_paged_attention import TOLERANCE, batch  # type: ignore[import-not-found]

from pdlab.kernels.experts import Activation
from pdlab.kernels.experts import cuda as expert_kernels
from pdlab.kernels.experts import reference as experts_reference
from pdlab.kernels.kv_blocks import cuda as blocks
from pdlab.kernels.kv_blocks import reference as blocks_reference
from pdlab.kernels.paged_attention import cuda, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter multiplies the bits of bfloat16


def attention(lengths: list[tuple[int, int]], window: int = 0, most: int = 0, **shape: object) -> None:
    made = batch(lengths, **shape)
    scale = made.q.shape[-1] ** -0.5
    expected = reference.paged_attention(*made.args(), scale=scale, window=window)
    args = [x.to(DEVICE) for x in made.args()]
    actual = cuda.paged_attention(*args, scale=scale, window=window, max_queries=most)
    torch.testing.assert_close(actual.cpu(), expected, **TOLERANCE[torch.float32 if made.q.dtype == torch.float32 else torch.bfloat16])


def store() -> None:
    qkv = torch.randn(10, 3 * 5 * 40, device=DEVICE)
    k, v = (part.unflatten(-1, (3, 40)) for part in qkv.split([120, 120, 360], -1)[:2])
    slots = torch.randperm(48, device=DEVICE)[:10]
    slots[3] = -1
    ours, theirs = torch.zeros(2, 2, 3, 3, 16, 40, device=DEVICE)
    cuda.store_kv(k, v, ours[0], ours[1], slots)
    reference.store_kv(k, v, theirs[0], theirs[1], slots)
    assert torch.equal(ours, theirs) and ours.any()


def transfer() -> None:
    kv = torch.randn(3, 2, 7, 3, 16, 40, device=DEVICE).bfloat16()
    ids = torch.tensor([6, 0, 3], dtype=torch.int32, device=DEVICE)
    packed = torch.empty(3, 2, 2, 3, 16, 40, device=DEVICE, dtype=torch.bfloat16)
    blocks.copy_blocks(kv, packed, ids, (1, 3), True)
    assert torch.equal(packed, blocks_reference.gather_blocks(kv, ids, layers=(1, 3)))
    into, expected = torch.zeros_like(kv), torch.zeros_like(kv)
    blocks.copy_blocks(into, packed, ids, (1, 3), False)
    blocks_reference.scatter_blocks(packed, expected, ids, layers=(1, 3))
    assert torch.equal(into, expected)


def experts(tokens: int, chosen: int, *, bias: bool, dtype: torch.dtype, activation: Activation = Activation(), here: int = 6) -> None:  # noqa: B008
    """Of 6 experts some are `here`; pairs of one exceed a tile, of others there are none."""
    random = torch.Generator().manual_seed(5)

    def matrix(out: int, inner: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        made = (torch.randn(out, inner, generator=random) * inner**-0.5).to(DEVICE, dtype)
        return made, torch.randn(out, generator=random).to(DEVICE, dtype) if bias else None

    each = [(matrix(2 * 40, 72), matrix(72, 40)) for _ in range(here)]
    x = torch.randn(tokens, 72, generator=random).to(DEVICE, dtype)
    ids = torch.stack([torch.randperm(5, generator=random)[:chosen] for _ in range(tokens)]).to(DEVICE)
    weights = torch.rand(tokens, chosen, generator=random).to(DEVICE)
    ours = expert_kernels.experts(x, ids, weights, expert_kernels.ExpertPointers(each), 40, activation)
    expected = experts_reference.experts(x, ids, weights, each, activation)
    torch.testing.assert_close(ours, expected, **TOLERANCE[torch.float32 if dtype == torch.float32 else torch.bfloat16])


def graph() -> None:
    """A captured decode step serves other contents of its tensors."""
    made = batch([(1, 300), (1, 40), (1, 900)])
    args = [x.to(DEVICE) for x in made.args()]
    args[3] = args[3].clamp(max=made.k_cache.shape[0] - 1)
    args[5].fill_(30)
    run = lambda: cuda.paged_attention(*args, scale=0.125, max_queries=1)  # noqa: E731
    run()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        out = run()
    args[5].copy_(made.contexts)
    captured.replay()
    torch.testing.assert_close(out.cpu(), reference.paged_attention(*made.args(), scale=0.125), **TOLERANCE[torch.float32])


def main() -> None:
    attention([(1, 300), (1, 1), (1, 33)], most=1)
    attention([(70, 70)])
    attention([(20, 90), (1, 200), (0, 5), (3, 3)], window=50, block_tokens=5, dim=24)
    attention([(30, 40), (1, 80)], dim=128, kv_heads=1, group=8, dtype=HALF)
    attention([(1, 70), (1, 5), (3, 20)], dim=576, kv_heads=1, group=20)
    store()
    transfer()
    experts(1, 2, bias=False, dtype=torch.float32)
    experts(40, 3, bias=True, dtype=torch.float32, activation=Activation(1.702, 7.0, 1.0))
    experts(20, 2, bias=False, dtype=HALF, here=3)
    if DEVICE == "cuda":
        graph()
    print("well")


if __name__ == "__main__":
    main()
