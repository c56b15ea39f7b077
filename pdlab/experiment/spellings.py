"""What others call what pdlab has: vLLM, SGLang, and the clients of vllm bench, SGLang, AIPerf and GuideLLM. The table is
docs/reference/mapping.md.

Flags that mean the same are options of `pdlab serve` themselves; here are those that do not, with what to do instead.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from pdlab.core.types import UsageError

_PP = (
    "pdlab's engine splits a model by --tensor-parallel-size alone; where vLLM is to split it by layers, start it with that and register "
    "it with --engine vllm --upstream URL (simulated: pp, of a row of cluster.instances)"
)
_COPIES = "start several instances, each with --registry URL, or count: N in the file's cluster.instances with --role all"
_PD = "give --role prefill or --role decode and --registry URL; --kv-transport says how KV goes"
_RATE = "--set workload.rate=3 (requests a second), or in the file"
_CLOSED = "--set 'workload.arrival={process: closed, concurrency: 8}', without a rate"
_SOURCE = "workload.source in the experiment file: a built-in workload, a trace's path, or synthetic"
FLAGS: dict[str, dict[str, str]] = {
    "serve": {
        **dict.fromkeys(("--pipeline-parallel-size", "-pp", "--pp-size"), _PP),
        **dict.fromkeys(("--data-parallel-size", "-dp", "--dp-size"), _COPIES),
        **dict.fromkeys(("--kv-transfer-config", "--disaggregation-mode", "--disaggregation-transfer-backend"), _PD),
        **dict.fromkeys(("--num-gpu-blocks-override", "--max-total-tokens"), "give --kv-gib, or engine.kv_blocks in the experiment file"),
        **dict.fromkeys(("--disable-hybrid-kv-cache-manager", "--disable-hybrid-swa-memory"), "every layer keeps all KV: remove it"),
        **dict.fromkeys(("--enforce-eager", "--disable-cuda-graph"), "there is nothing to turn off: remove it"),
        **dict.fromkeys(("--disable-log-requests", "--disable-log-stats", "--no-enable-log-requests"), "no request is logged: remove it"),
        **dict.fromkeys(("--seed", "--random-seed"), "seed in the experiment file; a request may bring its own"),
        "--trust-remote-code": "pdlab runs no code that comes with a model: remove it",
        "--uvicorn-log-level": "give --log-level",
        "--schedule-policy": "policy in the experiment file says who decides, engine.batching how batches are formed",
        "--download-dir": "pdlab downloads nothing: give a folder with --model",
        "--chat-template": "put it into the model's folder as chat_template.jinja",
    },
    "bench": {
        **dict.fromkeys(("--request-rate", "--rate"), _RATE),
        **dict.fromkeys(("--num-prompts", "--num-requests", "--request-count", "--max-requests"), "--requests N"),
        **dict.fromkeys(("--base-url", "--target"), "--url http://host:port"),
        **dict.fromkeys(("--host", "--port"), "--url http://host:port"),
        **dict.fromkeys(("--max-concurrency", "--concurrency"), _CLOSED),
        **dict.fromkeys(("--dataset-name", "--dataset-path", "--dataset", "--data", "--input-file"), _SOURCE),
        **dict.fromkeys(("--random-input-len", "--isl", "--synthetic-input-tokens-mean"), "--set workload.prompt=1024 (source: synthetic)"),
        **dict.fromkeys(("--random-output-len", "--osl", "--output-tokens-mean"), "--set workload.output=128 (source: synthetic)"),
        **dict.fromkeys(("--backend", "--endpoint", "--endpoint-type", "--streaming", "--ignore-eos"), "it is always so: remove it"),
        **dict.fromkeys(("--save-result", "--result-dir", "--output-path", "--artifact-dir"), "--out DIR; results are always saved"),
        "--goodput": "slo: {ttft_s: 0.5, tpot_s: 0.05} in the experiment file",
        "--tokenizer": "prompts are token ids: none is needed; --vocab says how many there are",
        "--served-model-name": "--model NAME",
        "--percentile-metrics": "all are in summary.json, with mean, std, p50, p90, p95, p99 and max",
    },
}
KEYS = {
    **dict.fromkeys(("max_num_seqs", "max_running_requests", "max_batch_size"), "engine.max_seqs"),
    **dict.fromkeys(("max_num_batched_tokens", "chunked_prefill_size", "max_prefill_tokens"), "engine.max_batch_tokens"),
    **dict.fromkeys(("gpu_memory_utilization", "mem_fraction_static"), "engine.hbm_utilization"),
    **dict.fromkeys(("block_size", "page_size"), "engine.block_tokens"),
    **dict.fromkeys(("num_gpu_blocks", "num_gpu_blocks_override"), "engine.kv_blocks"),
    **dict.fromkeys(("enable_prefix_caching", "disable_radix_cache"), "engine.prefix_cache"),
    "disable_hybrid_kv_cache_manager": "engine.hybrid_kv: false",
    **dict.fromkeys(("max_model_len", "context_length"), "engine.max_model_len"),
    **dict.fromkeys(("tensor_parallel_size", "tp_size", "tensor_parallel"), "tp, of a row of cluster.instances"),
    **dict.fromkeys(("kv_cache_dtype", "cache_dtype", "kv_dtype"), "engine.kv_cache_dtype"),
    "quantization": "quantization, at the top of the file",
    **dict.fromkeys(("dtype", "torch_dtype"), "dtype, at the top of the file"),
    "device": "device, at the top of the file or in a row of cluster.instances",
    **dict.fromkeys(("request_rate", "qps", "rps"), "workload.rate"),
    **dict.fromkeys(("num_prompts", "num_requests", "request_count", "max_requests"), "workload.requests"),
    **dict.fromkeys(("dataset", "dataset_name", "dataset_path", "trace"), "workload.source"),
    **dict.fromkeys(("random_input_len", "input_len", "isl", "prompt_len"), "workload.prompt"),
    **dict.fromkeys(("random_output_len", "output_len", "osl"), "workload.output"),
    **dict.fromkeys(("max_concurrency", "concurrency"), "workload.arrival: {process: closed, concurrency: N}"),
    **dict.fromkeys(("goodput", "ttft", "ttft_slo"), "slo.ttft_s"),
    **dict.fromkeys(("tpot", "itl", "tpot_slo"), "slo.tpot_s"),
    "kv_transfer_config": "transfer",
}
_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def check(arguments: Sequence[str]) -> None:
    """Raises UsageError at the first flag that is another program's."""
    hints = FLAGS.get(arguments[0], {}) if arguments else {}
    for word in arguments[1:]:
        flag = word.partition("=")[0]
        if flag in hints:
            raise UsageError(f"{flag}: {hints[flag]}")


def key(word: str) -> str:
    """What pdlab calls a key of others; empty where it has no such."""
    return KEYS.get(word.lower().replace("-", "_"), "")


def of_hub(name: str) -> bool:
    """Is it ORG/MODEL, as hubs name models?"""
    return _HUB.fullmatch(name) is not None and not name.endswith((".yaml", ".yml", ".json", ".gguf", ".py"))


def download(name: str, *, serve: bool) -> str:
    """What fetches it: pdlab fetches nothing. Its config alone is enough to simulate."""
    short = name.rpartition("/")[2]
    first, then = ("", f"--model {short}") if serve else (" config.json", f"model: {short}/config.json")
    return f"pdlab downloads nothing: `pip install huggingface_hub`, `hf download {name}{first} --local-dir {short}`, then {then}"
