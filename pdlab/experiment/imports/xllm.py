"""xLLM's engine (`xllm`), its service (`xllm_master_serving`), and their flags, which are gflags."""

from __future__ import annotations

from pdlab.experiment.imports.programs import LeftOut, Program, Sets, one_of, seconds, share, whole, yes

ONE_PORT = "instances and routers speak to each other over their --port"


def etcd(address: str) -> str:
    return f"etcd://{address.removeprefix('http://').removeprefix('https://').removeprefix('etcd://').rstrip('/')}"


def _device(text: str) -> str:
    """Raises ValueError for several: pdlab's engine has one."""
    if "," in text:
        raise ValueError("names several devices; pdlab's engine runs on one: give each instance its own")
    return text.strip().lower()


def _milliseconds(text: str) -> float:
    return seconds(text) / 1000.0


def _several(text: str) -> bool:
    """Groups of experts: pdlab spreads them over all ranks, or none."""
    return whole(text) > 1


ENGINE = Program(
    "xLLM",
    "instance",
    ("xllm",),
    {
        "--model": Sets("model"),
        "--model-id": Sets("served_name"),
        "--tokenizer-path": Sets("tokenizer"),
        "--host": Sets("host"),
        "--port": Sets("port", whole),
        "--devices": Sets("device", _device),
        "--enable-disagg-pd": Sets("disaggregated", yes, True),
        "--instance-role": Sets("role", one_of(prefill="prefill", decode="decode", mix="mixed", default="mixed")),
        "--etcd-addr": Sets("registry", etcd),
        "--etcd-namespace": LeftOut("write it into the registry's URL, as ?namespace=NAME"),
        "--transfer-listen-port": Sets("kv_port", whole),
        "--disagg-pd-port": LeftOut(ONE_PORT),
        "--device-ip": LeftOut("pdlab serve reads /etc/hccn.conf itself, and tells the address with the instance; `pdlab nics` prints it"),
        "--master-node-addr": Sets("master"),
        "--node-rank": Sets("node_rank", whole),
        "--nnodes": Sets("nodes", whole),
        "--enable-prefix-cache": Sets("prefix_cache", yes, True),
        "--enable-chunked-prefill": Sets("chunked", yes, True),
        "--block-size": Sets("block_tokens", whole),
        "--max-memory-utilization": Sets("hbm_utilization", share),
        "--max-tokens-per-batch": Sets("max_batch_tokens", whole),
        "--max-seqs-per-batch": Sets("max_seqs", whole),
        "--max-tokens-per-chunk-for-prefill": LeftOut("engine.max_batch_tokens bounds what a step computes, chunks with it"),
        "--max-tokens-per-chunk": LeftOut("engine.max_batch_tokens bounds what a step computes, chunks with it"),
        "--kv-cache-transfer-mode": Sets("transfer", one_of(push="push_layer", pull="pull")),
        "--kv-cache-transfer-type": LeftOut("--kv-transport is auto: shared memory on a host, else NIXL where it is installed, else TCP"),
        "--etcd-ttl": Sets("lease_s", seconds),
        "--heart-beat-interval": Sets("report_s", seconds),
        "--dp-size": Sets("count", whole),
        "--ep-size": Sets("experts_whole", _several),
        "--backend": LeftOut("pdlab serves language models"),
        "--max-global-ttft-ms": Sets("slo_ttft_s", _milliseconds),
        "--max-global-tpot-ms": Sets("slo_tpot_s", _milliseconds),
        "--enable-schedule-overlap": LeftOut("the engine has no such switch"),
        "--enable-pd-ooc": LeftOut("write policy: ooco, and engine.batching: online_first"),
        "--priority-strategy": LeftOut("requests of higher `priority` come first, then those that came first"),
    },
    defaults={
        "port": 8010,
        "prefix_cache": True,
        "chunked": True,
        "block_tokens": 128,
        "max_batch_tokens": 10240,
        "max_seqs": 200,
        "hbm_utilization": 0.8,
        "transfer": "push_layer",
        "device": "npu",
    },
)
SERVICE = Program(
    "xllm_master_serving",
    "router",
    ("xllm_master_serving", "xllm_service"),
    {
        "--etcd-addr": Sets("registry", etcd),
        "--etcd-namespace": LeftOut("write it into the registry's URL, as ?namespace=NAME"),
        "--http-server-host": Sets("host"),
        "--http-server-port": Sets("port", whole),
        "--server-host": Sets("host"),
        "--rpc-server-host": LeftOut(ONE_PORT),
        "--rpc-server-port": LeftOut(ONE_PORT),
        "--tokenizer-path": Sets("tokenizer"),
        "--load-balance-policy": Sets("policy", one_of(rr="round_robin", car="xllm_cache_aware", slo_aware="xllm_slo_aware")),
        "--target-ttft": Sets("slo_ttft_s", _milliseconds),
        "--target-tpot": Sets("slo_tpot_s", _milliseconds),
        "--block-size": LeftOut("instances tell their own"),
        "--timeout-ms": Sets("request_timeout_s", _milliseconds),
        "--detect-disconnected-instance-interval": Sets("suspect_s", seconds),
        "--lease-lost-heartbeat-timeout-ms": LeftOut("limits.lease_s says when an instance that is silent is probed"),
        "--instance-delete-probe-timeout-ms": LeftOut("limits.probe_s is for all probes together"),
        "--instance-delete-probe-attempts": LeftOut("limits.probe_s is for all probes together"),
        "--max-concurrency": Sets("max_in_flight", whole),
    },
    {
        "ENABLE_DECODE_RESPONSE_TO_SERVICE": Sets(
            "response_path", one_of(true="direct", false="via_prefill", **{"1": "direct", "0": "via_prefill"})
        )
    },
    {"port": 8888, "policy": "round_robin", "response_path": "direct"},
)
PROGRAMS = (ENGINE, SERVICE)
