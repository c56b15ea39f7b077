"""`make bench-gpu`: everything of pdlab that wants a GPU, in one run of about ten minutes, on one CUDA device.

What it prints goes into docs/lab-notes/benchmarks.md, with the device's name.

    bench_gpu.py [--only kernels experts engine transfer calibrate] [--models llama-3.1-8b qwen3-30b-a3b] [--batches 1 8 64 256]
                 [--contexts 1024 8192] [--prompt 8192] [--device cuda] [--steps 20] [--seconds 60]

kernels    each Triton kernel and a captured graph against the plain PyTorch of it (tests/kernels/triton_cases.py)
experts    a layer of routed experts in each form of weights, against the rate at which this device reads memory
engine     decode steps through the runner, graphs and all, against the time that reading weights and KV takes at the rate at which this
           device reads memory (asked: 70 % of it), and prompts against the rate of its library's large matrix products (asked: 60 %);
           weights are random
transfer   two processes on the one GPU: cuda_ipc and NIXL, bytes checked, GB/s
calibrate  `pdlab calibrate` of the engine on it

With --device cpu and a small model it is a rehearsal.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from pdlab.real.engine.graphs import GraphRunner
from pdlab.real.engine.runner import Piece, Runner
from pdlab.real.models import config as configs
from pdlab.real.models import weights
from pdlab.real.models.config import ModelConfig
from pdlab.real.models.model import DecoderModel

HERE = Path(__file__).resolve().parent
BLOCK_TOKENS = 16
GB = 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--models", nargs="*", default=["llama-3.1-8b", "qwen3-30b-a3b"], help="names of the catalogue, or folders")
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8, 64, 256])
    parser.add_argument("--contexts", nargs="*", type=int, default=[1024, 8192])
    parser.add_argument("--prompt", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seconds", type=int, default=60, help="for calibrate")
    parser.add_argument("--device", default="cuda")
    asked = parser.parse_args()
    if asked.device != "cpu" and not torch.cuda.is_available():
        sys.exit("torch sees no CUDA device here: run this where there is one, or rehearse with --device cpu and a small model")
    name = torch.cuda.get_device_name(asked.device) if asked.device != "cpu" else "a CPU, rehearsed"
    print(f"# {name}, torch {torch.__version__}\n", flush=True)
    failed = []
    for part in asked.only:
        print(f"## {part}\n", flush=True)
        try:
            PARTS[part](asked)
        except Exception:  # the other parts are worth their minutes
            traceback.print_exc()
            failed.append(part)
        print(flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def kernels(asked: argparse.Namespace) -> None:
    command = [sys.executable, str(HERE.parent / "tests" / "kernels" / "triton_cases.py")]
    environment = {**os.environ, **({"TRITON_INTERPRET": "1"} if asked.device == "cpu" else {})}
    print(subprocess.run(command, check=True, env=environment, capture_output=True, text=True).stdout)


def experts(asked: argparse.Namespace) -> None:
    models = ["tiny"] if asked.device == "cpu" else ["Qwen3-30B-A3B", "DeepSeek-V2-Lite"]
    tokens = [str(batch) for batch in asked.batches]
    command = [sys.executable, "-m", "pdlab.kernels.experts.bench", "--device", asked.device, "--models", *models, "--tokens", *tokens]
    narrow = [] if asked.device == "cpu" else ["fp8", "mxfp4"]  # a CPU widens them for each product
    command += ["--kinds", "bfloat16", "int8", "int4", *narrow, "--seconds", "0.01" if asked.device == "cpu" else "0.6"]
    print(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def engine(asked: argparse.Namespace) -> None:
    device = torch.device(asked.device)
    read, product = read_bytes_per_s(device), product_flops(device)
    print(f"reads {read / GB:,.0f} GB/s, multiplies large matrices at {product / 1e12:,.1f} TFLOP/s\n")
    for name in asked.models:
        config = configs.of(name, random=not Path(name).exists())
        model = random_model(config, device, max(asked.contexts) + asked.prompt + 64)
        print(f"| {name} | step, ms | bound, ms | of the bound |\n|---|---|---|---|")
        for context in asked.contexts:
            for batch in asked.batches:
                decode(model, context, batch, asked.steps, read)
        prefill(model, asked.prompt, product)
        print(flush=True)
        del model
        if device.type == "cuda":
            torch.cuda.empty_cache()


def decode(model: DecoderModel, context: int, batch: int, steps: int, read: float) -> None:
    label = f"| decode of {batch} at {context:,}"
    blocks_each = -(-(context + 1) // BLOCK_TOKENS)
    kv_token = model.config.kv_bytes_per_token(model.dtype.itemsize)
    needed = kv_token * BLOCK_TOKENS * blocks_each * batch
    if needed > 0.9 * free_bytes(model.device):
        print(f"{label} | KV of {needed / GB:,.0f} GB does not fit | | |", flush=True)
        return
    runner = runner_of(model, blocks_each * batch, context + 1, batch)
    pieces = [
        Piece([token % model.config.vocab], context, range(token * blocks_each, (token + 1) * blocks_each), True) for token in range(batch)
    ]
    took = median_s(lambda: runner.run(pieces).argmax(-1).cpu(), steps)
    bound = (step_weight_bytes(model, batch) + kv_token * (context + 1) * batch) / read
    print(f"{label} | {took * 1e3:.3f} | {bound * 1e3:.3f} | {bound / took:.0%} |", flush=True)


def prefill(model: DecoderModel, tokens: int, product: float) -> None:
    runner = runner_of(model, -(-tokens // BLOCK_TOKENS), tokens, 1)
    pieces = [Piece([i % model.config.vocab for i in range(tokens)], 0, range(-(-tokens // BLOCK_TOKENS)), True)]
    took = median_s(lambda: runner.run(pieces).argmax(-1).cpu(), 5)
    c = model.config
    flops = 2 * tokens * multiplied(c, active=True) + 2 * c.layers * tokens * tokens * c.heads * c.head_dim  # half of a square, K and V
    print(f"| prompt of {tokens:,} | {took * 1e3:.1f} | {flops / product * 1e3:.1f} | {flops / product / took:.0%} |", flush=True)


def runner_of(model: DecoderModel, blocks: int, tokens: int, batch: int) -> Runner:
    if model.device.type == "cuda":
        return GraphRunner(model, max_tokens=tokens, max_seqs=batch, kv_blocks=blocks, block_tokens=BLOCK_TOKENS)
    return Runner(model, kv_blocks=blocks, block_tokens=BLOCK_TOKENS)


def random_model(config: ModelConfig, device: torch.device, positions: int) -> DecoderModel:
    """Made on the device, bfloat16 there: a CPU would take minutes."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def made() -> Iterator[tuple[str, Tensor]]:
        for name, shape in weights.shapes(config).items():
            tensor = torch.empty(shape, dtype=dtype, device=device)
            yield name, tensor.fill_(1.0) if name.endswith("norm.weight") else tensor.normal_(0.0, 0.02)

    return DecoderModel(config, made(), device=device, dtype=dtype, max_positions=positions)


def multiplied(config: ModelConfig, *, active: bool) -> float:
    """Weights that a token meets in products (`active`: of the experts, those that it is sent to), the head left out."""
    total = 0.0
    for name, shape in weights.shapes(config).items():
        if len(shape) < 2 or name.startswith(("model.embed", "lm_head")):
            continue
        expert = config.moe is not None and ".experts." in name
        total += math.prod(shape) * (config.moe.per_token / config.moe.experts if expert and active and config.moe else 1.0)
    return total


def step_weight_bytes(model: DecoderModel, batch: int) -> float:
    """What a decode step must read of them: of the experts, those that `batch` tokens chosen at random are expected to meet."""
    c, item = model.config, model.dtype.itemsize
    routed = multiplied(c, active=False)
    if c.moe is not None:
        experts = sum(math.prod(shape) for name, shape in weights.shapes(c).items() if ".experts." in name and len(shape) > 1)
        met = 1 - (1 - c.moe.per_token / c.moe.experts) ** batch
        routed -= experts * (1 - met)
    return (routed + c.vocab * c.hidden) * item


def read_bytes_per_s(device: torch.device) -> float:
    """Of a sum over what no cache holds."""
    memory = torch.ones((4 << 30 if device.type == "cuda" else 64 << 20) // 4, device=device)
    return memory.nbytes / median_s(lambda: memory.sum().item(), 10)


def product_flops(device: torch.device) -> float:
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    return 2 * n**3 / median_s(lambda: (a @ b)[0, 0].item(), 10)


def free_bytes(device: torch.device) -> float:
    return float(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else 4e9


def median_s(run: Callable[[], object], times: int) -> float:
    """Of runs that each wait for their result, after two to warm up."""
    took = []
    with torch.inference_mode():
        for _ in range(times + 2):
            began = time.perf_counter()
            run()
            took.append(time.perf_counter() - began)
    return statistics.median(took[2:])


def transfer(asked: argparse.Namespace) -> None:
    command = [sys.executable, str(HERE / "bench_transfer.py"), "--device", asked.device]
    command += ["--layers", "1", "--kv-heads", "8", "--head-dim", "128"]
    subprocess.run(command, check=True)


def calibrate(asked: argparse.Namespace) -> None:
    """The engine with random weights on the device, measured as a user would."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pdlab", "calibrate", "--model", asked.models[0], "--load-format", "dummy"]
        subprocess.run([*command, "--device", asked.device, "--seconds", str(asked.seconds), "--out", f"{folder}/profile.json"], check=True)


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {
    "kernels": kernels,
    "experts": experts,
    "engine": engine,
    "transfer": transfer,
    "calibrate": calibrate,
}

if __name__ == "__main__":
    main()
