"""What the Triton kernels must do: run under TRITON_INTERPRET=1 on a CPU, or plainly on CUDA, by test_triton.py and by hand."""

from __future__ import annotations

import sys
from dataclasses import fields, replace
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from test_experts import by_hand, layer  # type: ignore[import-not-found]
from test_paged_attention import E4M3, TOLERANCE, batch  # type: ignore[import-not-found]

from pdlab.kernels.decode.reference import Weight
from pdlab.kernels.experts import Activation
from pdlab.kernels.experts import cuda as experts
from pdlab.kernels.fused import cuda as fused
from pdlab.kernels.fused import reference as fused_reference
from pdlab.kernels.kv_blocks import cuda as blocks
from pdlab.kernels.kv_blocks import reference as blocks_reference
from pdlab.kernels.paged_attention import cuda, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter multiplies the bits of bfloat16


def attention(
    lengths: list[tuple[int, int]], window: int = 0, most: int = 0, sinks: bool = False, one: bool = False, **shape: object
) -> None:
    """`one`: keys and values are one cache."""
    made = batch(lengths, **shape)
    args = list(made.args())
    if one:
        args[2] = args[1]
    kept = torch.randn(made.q.shape[1], generator=torch.Generator().manual_seed(1)) * 3 if sinks else None
    scale = made.q.shape[-1] ** -0.5
    expected = reference.paged_attention(*args, scale=scale, window=window, sinks=kept)
    there = [x.to(DEVICE) for x in args]
    if one:
        there[2] = there[1]
    kept = None if kept is None else kept.to(DEVICE)
    actual = cuda.paged_attention(*there, scale=scale, window=window, max_queries=most, sinks=kept)
    torch.testing.assert_close(actual.cpu(), expected, **TOLERANCE[torch.float32 if made.q.dtype == torch.float32 else torch.bfloat16])


def small_steps() -> None:
    for dtype in (torch.float32, HALF):
        tolerance = TOLERANCE[torch.float32 if dtype == torch.float32 else torch.bfloat16]
        random = torch.Generator().manual_seed(0)
        x, weight = torch.randn(5, 300, generator=random).to(dtype)[:, :100], torch.rand(100, generator=random).to(dtype)
        for beside in (None, torch.randn(5, 100, generator=random).to(dtype)):
            ours, theirs = (None if beside is None else beside.clone().to(DEVICE), None if beside is None else beside.clone())
            found = fused.rms_norm(x.to(DEVICE), weight.to(DEVICE), 1e-5, ours)
            torch.testing.assert_close(found.cpu(), fused_reference.rms_norm(x.clone(), weight, 1e-5, theirs), **tolerance)
            if ours is not None:
                torch.testing.assert_close(ours.cpu(), theirs, **tolerance)
        wide = torch.randn(3, 2 * 1100, generator=random).to(dtype)
        torch.testing.assert_close(fused.silu_and_mul(wide.to(DEVICE)).cpu(), fused_reference.silu_and_mul(wide), **tolerance)
        qkv, positions = torch.randn(4, 23 * 40, generator=random).to(dtype), torch.tensor([0, 7, 3, 9])
        cos, sin = torch.randn(2, 10, 20, generator=random)
        turned, expected = qkv.clone().to(DEVICE), qkv.clone()
        for of, tensor, device in ((fused, turned, DEVICE), (fused_reference, expected, "cpu")):
            q, k = tensor.view(4, 23, 40)[:, :18], tensor.view(4, 23, 40)[:, 18:21]
            of.rope(q, k, positions.to(device), cos.to(device), sin.to(device))
        torch.testing.assert_close(turned.cpu(), expected, **tolerance)


def on_device(weight: Weight, dtype: torch.dtype) -> Weight:
    if isinstance(weight, Tensor):
        return weight.to(DEVICE, dtype)
    tensors = {at.name: value.to(DEVICE) for at in fields(weight) if isinstance(value := getattr(weight, at.name), Tensor)}
    return replace(weight, **tensors)


def routed(
    tokens: int, chosen: int, dtype: torch.dtype, *, bias: bool, activation: Activation, here: int = 5, kind: str = "float32"
) -> None:
    """Of five experts the first `here` are here."""
    width = 72 if kind in ("float32", "int8", "fp8") else 64  # groups of 32 inputs are whole
    stored, plain = layer(kind, 5, 96, width, bias=bias, dtype=dtype)
    there = [tuple((on_device(w, dtype), None if b is None else b.to(DEVICE)) for w, b in expert) for expert in stored]
    random = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, 99, generator=random).to(dtype)[:, 1:97]
    ids = torch.stack([torch.randperm(4, generator=random)[:chosen] for _ in range(tokens)])  # the last one is nobody's
    weights = torch.rand(tokens, chosen, generator=random)
    where = experts.ExpertPointers(there[:here])
    found = experts.experts(x.to(DEVICE), ids.to(DEVICE), weights.to(DEVICE), where, width, activation)
    tolerance = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.05, "rtol": 3e-2}
    torch.testing.assert_close(found.cpu().double(), by_hand(x, ids, weights * (ids < here), plain, activation), **tolerance)


def store(kept: torch.dtype = torch.float32) -> None:
    qkv = torch.randn(10, 3 * 5 * 40, device=DEVICE) * 200  # some beyond the largest float8
    k, v = (part.unflatten(-1, (3, 40)) for part in qkv.split([120, 120, 360], -1)[:2])
    slots = torch.randperm(48, device=DEVICE)[:10]
    slots[3] = -1
    ours, theirs = (torch.zeros(2, 3, 3, 16, 40, device=DEVICE, dtype=kept) for _ in range(2))
    cuda.store_kv(k, v, ours[0], ours[1], slots)
    reference.store_kv(k, v, theirs[0], theirs[1], slots)
    assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)) and ours.float().any()


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
    attention([(20, 90), (1, 200), (3, 3)], sinks=True, window=30)
    attention([(1, 700), (4, 20)], dim=96, sinks=True)
    attention([(9, 33), (1, 300)], dim=576, kv_heads=1, group=20, one=True, dtype=HALF)
    attention([(3, 40), (1, 90)], dim=40, kv_heads=1, group=4, one=True)
    attention([(9, 33), (1, 90)], dtype=HALF, stored=E4M3)
    attention([(3, 40), (1, 90)], dim=40, kv_heads=1, group=4, one=True, stored=E4M3)
    store()
    store(E4M3)
    transfer()
    small_steps()
    routed(1, 2, torch.float32, bias=False, activation=Activation())
    routed(9, 3, HALF, bias=True, activation=Activation(1.702, 0.7, 1.0))
    routed(20, 2, HALF, bias=False, activation=Activation(), here=3)
    routed(90, 2, torch.float32, bias=True, activation=Activation(1.702, 0.7, 1.0))
    for kind in ("int8", "int4", "fp8", "mxfp4"):
        routed(2, 2, HALF, bias=False, activation=Activation(), kind=kind)
    routed(9, 3, torch.float32, bias=True, activation=Activation(1.702, 0.7, 1.0), here=4, kind="fp8")
    if DEVICE == "cuda":
        graph()
    print("well")


if __name__ == "__main__":
    main()
