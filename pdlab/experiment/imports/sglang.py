"""SGLang's server, whose `--disaggregation-mode` is its role, and its routers."""

from __future__ import annotations

from pdlab.experiment.imports.programs import LeftOut, Program, Sets, kv_cache_dtype, no, one_of, share, whole, words
from pdlab.experiment.imports.vllm import FOUND, address_ports

POLICIES = one_of(
    random="random", round_robin="round_robin", cache_aware="prefix_aware", power_of_two="power_of_two", minimum_tokens="least_loaded"
)
BOOTSTRAP = "what a KV descriptor needs comes with the registry's record"


def prefill_ports(text: str) -> tuple[int, ...]:
    """Of a URL that its bootstrap port may follow. Raises ValueError."""
    return address_ports(words(text)[0])


SERVER = Program(
    "SGLang",
    "instance",
    ("sglang.launch_server", "sglang serve"),
    {
        "--model-path": Sets("model"),
        "--model": Sets("model"),
        "--served-model-name": Sets("served_name"),
        "--tokenizer-path": Sets("tokenizer"),
        "--host": Sets("host"),
        "--port": Sets("port", whole),
        "--disaggregation-mode": Sets("role", one_of(prefill="prefill", decode="decode", null="mixed")),
        "--disaggregation-transfer-backend": LeftOut(
            "--kv-transport is auto: shared memory on a host, else NIXL where it is installed, else TCP"
        ),
        "--disaggregation-bootstrap-port": LeftOut(BOOTSTRAP),
        "--disaggregation-ib-device": Sets("nics", words),
        "--disaggregation-decode-tp": LeftOut("each instance says its own tp"),
        "--disaggregation-prefill-pp": LeftOut("pdlab has no pipeline parallelism live"),
        "--base-gpu-id": Sets("device", lambda text: f"cuda:{whole(text)}"),
        "--device": Sets("device", one_of(cpu="cpu", cuda="cuda", npu="npu")),
        "--tp-size": Sets("tp", whole),
        "--tp": Sets("tp", whole),
        "--tensor-parallel-size": Sets("tp", whole),
        "--dp-size": Sets("count", whole),
        "--dp": Sets("count", whole),
        "--data-parallel-size": Sets("count", whole),
        "--nnodes": Sets("nodes", whole),
        "--node-rank": Sets("node_rank", whole),
        "--dist-init-addr": Sets("master"),
        "--dtype": Sets(
            "dtype", one_of(auto="auto", half="float16", float16="float16", bfloat16="bfloat16", float="float32", float32="float32")
        ),
        "--quantization": LeftOut("a quantized folder says so itself; pdlab's own are wint8 and wint4"),
        "--kv-cache-dtype": Sets("kv_cache_dtype", kv_cache_dtype),
        "--context-length": Sets("max_model_len", whole),
        "--mem-fraction-static": Sets("hbm_utilization", share),
        "--max-running-requests": Sets("max_seqs", whole),
        "--max-queued-requests": LeftOut("limits.max_in_flight bounds a router's requests"),
        "--max-total-tokens": Sets("kv_tokens", whole),
        "--chunked-prefill-size": Sets("chunk", whole),
        "--max-prefill-tokens": LeftOut("engine.max_batch_tokens bounds what a step computes"),
        "--scheduler-recv-interval": Sets("recv_interval", whole),
        "--page-size": Sets("block_tokens", whole),
        "--disable-radix-cache": Sets("prefix_cache", no, False),
        "--schedule-policy": LeftOut("prompts are taken as they came, those of higher priority first"),
        "--random-seed": Sets("seed", whole),
        "--trust-remote-code": LeftOut("pdlab runs no code that comes with a model", switch=True),
        "--disable-cuda-graph": LeftOut("there is nothing to turn off", switch=True),
        "--enable-metrics": LeftOut("/metrics is always there", switch=True),
        "--log-level": Sets("log_level"),
        "--api-key": LeftOut("no secret is written: give it by PDLAB_API_KEY"),
        "--attention-backend": LeftOut("pdlab has its own kernels"),
    },
    {"CUDA_VISIBLE_DEVICES": Sets("visible", words), "MC_TE_METRIC": LeftOut("`pdlab status` and /metrics tell of transfers")},
    {"port": 30000, "role": "mixed", "tp": 1, "transfer": "push_chunk", "first_token": "decode"},
)
ROUTER = Program(
    "SGLang's router",
    "router",
    ("sglang_router.launch_router", "sglang-router launch", "sglang.srt.disaggregation.mini_lb", "sglang.srt.disaggregation.launch_lb"),
    {
        "--host": Sets("host"),
        "--port": Sets("port", whole),
        "--pd-disaggregation": LeftOut("the instances' roles say it", switch=True),
        "--mini-lb": LeftOut("pdlab's router is one", switch=True),
        "--prefill": Sets("prefill_ports", prefill_ports, why=FOUND, many=True),
        "--decode": Sets("decode_ports", address_ports, why=FOUND, many=True),
        "--worker-urls": LeftOut(FOUND),
        "--policy": Sets("policy", POLICIES),
        "--prefill-policy": Sets("dispatch", POLICIES),
        "--decode-policy": Sets("handoff", POLICIES),
        "--prefill-bootstrap-ports": LeftOut(BOOTSTRAP),
        "--api-key": LeftOut("no secret is written: give it by PDLAB_API_KEY"),
        "--log-level": Sets("log_level"),
    },
    defaults={"port": 30000, "policy": "prefix_aware"},
)
PROGRAMS = (SERVER, ROUTER)
