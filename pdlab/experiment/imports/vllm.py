"""vLLM's server, with what its `--kv-transfer-config` says of roles, and the proxies that stand before its prefill and decode servers."""

from __future__ import annotations

import json
import re

from pdlab.core.types import UsageError
from pdlab.experiment.imports.programs import LeftOut, Meaning, Program, Sets, kv_cache_dtype, no, numbers, one_of, share, whole, words, yes
from pdlab.experiment.speculative_config import METHODS, plain

FOUND = "routers and instances find each other in the registry"
NOTHING = "there is nothing to turn off"
ROLES = {"kv_producer": "prefill", "kv_consumer": "decode", "kv_both": "both"}


def kv_role(text: str) -> str:
    """Raises ValueError."""
    try:
        found = json.loads(text)
        role = found["kv_role"]
    except (ValueError, KeyError, TypeError):
        raise ValueError('is no JSON that has "kv_role"') from None
    if role not in ROLES:
        raise ValueError(f"has kv_role {role!r}, which is not one of {', '.join(ROLES)}")
    return ROLES[role]


def _dtype(text: str) -> str:
    found = {"half": "float16", "float": "float32"}.get(text, text)
    if found not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError("is not one of auto, float32, bfloat16, float16")
    return found


def _speculation(text: str) -> dict[str, object]:
    try:
        return plain(text, (*METHODS, "mtp"))
    except UsageError as error:
        raise ValueError(f"cannot be carried over: {error}") from None


ENGINE_FLAGS: dict[str, Meaning] = {
    "--model": Sets("model"),
    "--served-model-name": Sets("served_name"),
    "--tokenizer": Sets("tokenizer"),
    "--dtype": Sets("dtype", _dtype),
    "--quantization": LeftOut("a quantized folder says so itself; pdlab's own are wint8 and wint4"),
    "-q": LeftOut("a quantized folder says so itself; pdlab's own are wint8 and wint4"),
    "--load-format": LeftOut("weights are read as the folder has them"),
    "--max-model-len": Sets("max_model_len", whole),
    "--max-num-seqs": Sets("max_seqs", whole),
    "--max-num-batched-tokens": Sets("max_batch_tokens", whole),
    "--block-size": Sets("block_tokens", whole),
    "--gpu-memory-utilization": Sets("hbm_utilization", share),
    "--num-gpu-blocks-override": Sets("kv_blocks", whole),
    "--tensor-parallel-size": Sets("tp", whole),
    "-tp": Sets("tp", whole),
    "--nnodes": Sets("nodes", whole),
    "--node-rank": Sets("node_rank", whole),
    "--master-addr": Sets("master_host"),
    "--master-port": Sets("master_port", whole),
    "--data-parallel-size": Sets("count", whole),
    "-dp": Sets("count", whole),
    "--pipeline-parallel-size": LeftOut("pdlab has no pipeline parallelism live"),
    "-pp": LeftOut("pdlab has no pipeline parallelism live"),
    "--enable-prefix-caching": Sets("prefix_cache", yes, True),
    "--no-enable-prefix-caching": Sets("prefix_cache", no, False),
    "--enable-chunked-prefill": Sets("chunked", yes, True),
    "--no-enable-chunked-prefill": Sets("chunked", no, False),
    "--seed": Sets("seed", whole),
    "--trust-remote-code": LeftOut("pdlab runs no code that comes with a model", switch=True),
    "--otlp-traces-endpoint": LeftOut("`pdlab serve --otlp-endpoint` takes it; traces go by HTTP, not gRPC"),
    "--enforce-eager": LeftOut(NOTHING, switch=True),
    "--disable-log-requests": LeftOut("no request is logged", switch=True),
    "--disable-log-stats": LeftOut("no request is logged", switch=True),
    "--kv-cache-dtype": Sets("kv_cache_dtype", kv_cache_dtype),
    "--swap-space": LeftOut("KV is not swapped to the host's memory"),
    "--distributed-executor-backend": LeftOut("each rank is a process; --nnodes spreads them over hosts"),
    "--enable-expert-parallel": Sets("experts_whole", yes, True),
    "--speculative-config": Sets("speculation", _speculation),
    "--enable-auto-tool-choice": LeftOut("calls of tools are read where the chat template shows how", switch=True),
    "--tool-call-parser": LeftOut("give --tool-call-parser to pdlab serve; hermes and llama3_json are known"),
    "--device": LeftOut("give --device to pdlab import"),
    "--api-key": LeftOut("no secret is written: give it by PDLAB_API_KEY"),
}
SERVER = Program(
    "vLLM",
    "instance",
    ("vllm serve", "vllm.entrypoints.openai.api_server"),
    {
        **ENGINE_FLAGS,
        "--host": Sets("host"),
        "--port": Sets("port", whole),
        "--kv-transfer-config": Sets("role", kv_role),
        "--ssl-certfile": Sets("certfile"),
        "--ssl-keyfile": Sets("keyfile"),
        "--uvicorn-log-level": Sets("log_level"),
    },
    {
        "CUDA_VISIBLE_DEVICES": Sets("visible", words),
        "VLLM_NIXL_SIDE_CHANNEL_PORT": LeftOut("what a KV descriptor needs comes with the registry's record"),
        "VLLM_NIXL_SIDE_CHANNEL_HOST": LeftOut("--advertise is what peers reach an instance by"),
        "UCX_NET_DEVICES": Sets("ucx_devices"),
        "UCX_TLS": LeftOut("export it before pdlab serve, which hands it to NIXL"),
        "VLLM_KV_CACHE_LAYOUT": LeftOut("KV is laid out in one way"),
    },
    {"port": 8000, "role": "mixed", "tp": 1, "transfer": "pull", "first_token": "decode"},
    positional="model",
)
_PORTS = {
    "--prefiller-host": Sets("prefill_hosts", words, why=FOUND, many=True),
    "--prefiller-hosts": Sets("prefill_hosts", words, why=FOUND, many=True),
    "--prefiller-port": Sets("prefill_ports", numbers, why=FOUND, many=True),
    "--prefiller-ports": Sets("prefill_ports", numbers, why=FOUND, many=True),
    "--decoder-host": Sets("decode_hosts", words, why=FOUND, many=True),
    "--decoder-hosts": Sets("decode_hosts", words, why=FOUND, many=True),
    "--decoder-port": Sets("decode_ports", numbers, why=FOUND, many=True),
    "--decoder-ports": Sets("decode_ports", numbers, why=FOUND, many=True),
}


def address_ports(text: str) -> tuple[int, ...]:
    """Of URLs, or of host:port. Raises ValueError."""
    found = [re.search(r":(\d+)/?$", part) for part in words(text)]
    if not all(found):
        raise ValueError("is no address with a port")
    return tuple(int(one[1]) for one in found if one is not None)


PROXY = Program(
    "vLLM's proxy",
    "router",
    ("toy_proxy_server.py", "disagg_proxy_demo.py", "disagg_prefill_proxy_server.py", "vllm-router"),
    {
        **_PORTS,
        "--host": Sets("host"),
        "--port": Sets("port", whole),
        "--prefill": Sets("prefill_ports", address_ports, why=FOUND, many=True),
        "--decode": Sets("decode_ports", address_ports, why=FOUND, many=True),
        "-p": Sets("prefill_ports", address_ports, why=FOUND, many=True),
        "-d": Sets("decode_ports", address_ports, why=FOUND, many=True),
        "--model": LeftOut("the instances say it"),
        "--vllm-pd-disaggregation": LeftOut("the instances' roles say it", switch=True),
        "--policy": Sets(
            "policy", one_of(round_robin="round_robin", random="random", power_of_two="power_of_two", cache_aware="prefix_aware")
        ),
    },
    defaults={"port": 8000, "policy": "round_robin"},
)
PROGRAMS = (SERVER, PROXY)
