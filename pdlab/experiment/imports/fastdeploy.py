"""FastDeploy's API server, whose scheduler meets in Redis: every server takes requests, and there is no router of its own."""

from __future__ import annotations

from pdlab.experiment.imports.programs import LeftOut, Program, Sets, no, numbers, one_of, seconds, share, whole, words, yes

SAME_PORT = "its peers reach pdlab's instance by --port and --kv-port alone"
FOUND = "routers and instances find each other in the registry"


def transport(text: str) -> str:
    """Both: whichever reaches. ipc alone is within a host, where auto has it. Raises ValueError."""
    named = set(words(text))
    if not named or named - {"ipc", "rdma"}:
        raise ValueError("is not ipc, rdma, or both")
    return "nixl" if named == {"rdma"} else "auto"


API_SERVER = Program(
    "FastDeploy",
    "instance",
    ("fastdeploy.entrypoints.openai.api_server",),
    {
        "--model": Sets("model"),
        "--served-model-name": Sets("served_name"),
        "--tokenizer": Sets("tokenizer"),
        "--host": Sets("host"),
        "--port": Sets("port", whole),
        "--metrics-port": Sets("metrics_port", whole),
        "--engine-worker-queue-port": LeftOut("the HTTP process and the engine speak over a socket pair, which needs no port"),
        "--cache-queue-port": LeftOut(SAME_PORT),
        "--tensor-parallel-size": Sets("tp", whole),
        "--data-parallel-size": Sets("count", whole),
        "--quantization": Sets("quantization", one_of(wint4="wint4", wint8="wint8")),
        "--dtype": Sets("dtype"),
        "--cache-transfer-protocol": Sets("transport", transport),
        "--rdma-comm-ports": Sets("kv_ports", numbers, many=True),
        "--pd-comm-port": Sets("pd_ports", numbers, why=SAME_PORT, many=True),
        "--splitwise-role": Sets("role", one_of(prefill="prefill", decode="decode", mixed="mixed")),
        "--inner-prefill-ports": Sets("local_prefills", numbers, why=FOUND, many=True),
        "--innode-prefill-ports": Sets("local_prefills", numbers, why=FOUND, many=True),
        "--scheduler-name": Sets("scheduler", one_of(splitwise="splitwise", local="local", **{"global": "global"}, dp="dp")),
        "--scheduler-host": Sets("redis_host"),
        "--scheduler-port": Sets("redis_port", whole),
        "--scheduler-db": Sets("redis_db", whole),
        "--scheduler-password": LeftOut("no secret is written: give it by PDLAB_REGISTRY_PASSWORD"),
        "--scheduler-topic": Sets("namespace"),
        "--scheduler-ttl": Sets("request_timeout_s", seconds),
        "--max-model-len": Sets("max_model_len", whole),
        "--max-num-seqs": Sets("max_seqs", whole),
        "--max-num-batched-tokens": Sets("max_batch_tokens", whole),
        "--block-size": Sets("block_tokens", whole),
        "--gpu-memory-utilization": Sets("hbm_utilization", share),
        "--num-gpu-blocks-override": Sets("kv_blocks", whole),
        "--enable-prefix-caching": Sets("prefix_cache", yes, True),
        "--no-enable-prefix-caching": Sets("prefix_cache", no, False),
        "--enable-chunked-prefill": Sets("chunked", yes, True),
        "--router": LeftOut(FOUND),
        "--load-choices": LeftOut("weights are read as the folder has them"),
        "--max-concurrency": Sets("max_in_flight", whole),
        "--use-cudagraph": LeftOut("CUDA graphs are on where there is a GPU", switch=True),
        "--enable-logprob": LeftOut("log-probabilities are always to be had", switch=True),
        "--enable-overlap-schedule": LeftOut("the engine has no such switch", switch=True),
        "--swap-space": LeftOut("KV is not swapped to the host's memory"),
        "--kv-cache-ratio": LeftOut("blocks are not divided between prompts and answers"),
    },
    {
        "FD_LOG_DIR": LeftOut("pdlab serve logs to stderr: redirect it, each instance's to its own file"),
        "CUDA_VISIBLE_DEVICES": Sets("visible", words),
        "ENABLE_V1_KVCACHE_SCHEDULER": LeftOut("there is one scheduler, which gives KV blocks out as they are needed"),
        "KVCACHE_RDMA_NICS": Sets("nics", words),
        "$()": Sets("nics_script"),
        "FD_PD_CHANGEABLE": LeftOut("roles change by `pdlab switch`, or by a policy that resizes"),
        "KVCACHE_GDRCOPY_FLUSH_ENABLE": LeftOut("the transport orders what it writes"),
    },
    {
        "port": 8000,
        "role": "mixed",
        "tp": 1,
        "block_tokens": 64,
        "scheduler": "local",
        "transfer": "push_layer",
        "policy": "fastdeploy_splitwise",
        "device": "cuda",
    },
)
ROUTER = Program(
    "FastDeploy's router",
    "router",
    ("fastdeploy.router.launch",),
    {
        "--host": Sets("host"),
        "--port": Sets("port", whole),
        "--splitwise": LeftOut("the instances' roles say it", switch=True),
        "--request-timeout-secs": Sets("request_timeout_s", seconds),
    },
    defaults={"port": 9000, "policy": "random"},
)
PROGRAMS = (API_SERVER, ROUTER)
