"""Dynamo's frontend, which routes, and its workers, which are vLLM or SGLang inside."""

from __future__ import annotations

from pdlab.experiment.imports import sglang, vllm
from pdlab.experiment.imports.programs import LeftOut, Meaning, Program, Sets, one_of, words
from pdlab.experiment.imports.programs import whole as whole_number
from pdlab.experiment.imports.xllm import etcd

NATS = "pdlab's instances need no message queue: requests go to them over HTTP, events by the registry"
VARIABLES: dict[str, Meaning] = {
    "ETCD_ENDPOINTS": Sets("registry", etcd),
    "NATS_SERVER": LeftOut(NATS),
    "CUDA_VISIBLE_DEVICES": Sets("visible", words),
    "DYN_SYSTEM_PORT": Sets("metrics_port", whole_number),
    "DYN_SYSTEM_ENABLED": LeftOut("/health and /metrics are always there"),
    "DYN_LOG": LeftOut("give --log-level to pdlab serve"),
    "DYN_HTTP_PORT": Sets("port", whole_number),
    "DYN_NAMESPACE": LeftOut("write it into the registry's URL, as ?namespace=NAME"),
    "VLLM_NIXL_SIDE_CHANNEL_PORT": LeftOut("what a KV descriptor needs comes with the registry's record"),
    "DYN_VLLM_KV_EVENT_PORT": LeftOut("cached blocks are told by the registry"),
}
_WORKER: dict[str, Meaning] = {
    "--is-prefill-worker": Sets("role", const="prefill"),
    "--is-decode-worker": Sets("role", const="decode"),
    "--disaggregation-mode": Sets("role", one_of(prefill="prefill", decode="decode", agg="mixed", aggregated="mixed")),
    "--migration-limit": Sets("max_attempts", lambda text: whole_number(text) + 1),
    "--connector": LeftOut("--kv-transport is auto: shared memory on a host, else NIXL where it is installed, else TCP"),
    "--kv-events-config": LeftOut("cached blocks are told by the registry"),
    "--kv-transfer-config": LeftOut("the worker's role says it"),
    "--endpoint": LeftOut("the instance is found by its name in the registry"),
}
WORKER = Program(
    "Dynamo's vLLM worker",
    "instance",
    ("dynamo.vllm",),
    {**vllm.ENGINE_FLAGS, **_WORKER},
    VARIABLES,
    {"role": "decode", "tp": 1, "transfer": "pull", "first_token": "decode", "port": 0},
)
SGLANG_WORKER = Program(
    "Dynamo's SGLang worker",
    "instance",
    ("dynamo.sglang",),
    {**sglang.SERVER.flags, **_WORKER},
    VARIABLES,
    {"role": "mixed", "tp": 1, "transfer": "push_chunk", "first_token": "decode", "port": 0},
)
FRONTEND = Program(
    "Dynamo's frontend",
    "router",
    ("dynamo.frontend",),
    {
        "--http-host": Sets("host"),
        "--http-port": Sets("port", whole_number),
        "--router-mode": Sets("policy", one_of(round_robin="round_robin", random="random", kv="prefix_aware")),
        "--kv-cache-block-size": LeftOut("instances tell their own"),
        "--kv-overlap-score-weight": LeftOut("prefix_aware weighs cached prompts by the time that they save"),
        "--router-temperature": LeftOut("prefix_aware takes the best"),
        "--no-kv-events": LeftOut("instances tell what they cache with their reports", switch=True),
        "--router-replica-sync": LeftOut("several routers follow the same reports", switch=True),
        "--router-reset-states": LeftOut("a router begins with what instances report", switch=True),
        "--busy-threshold": LeftOut("limits.max_in_flight bounds a router's requests"),
        "--model-name": Sets("served_name"),
        "--model-path": Sets("tokenizer"),
        "--tls-cert-path": Sets("certfile"),
        "--tls-key-path": Sets("keyfile"),
        "--namespace": LeftOut("write it into the registry's URL, as ?namespace=NAME"),
        "--store-kv": LeftOut("etcd or redis by the registry's URL; without one, --role all keeps it in memory"),
        "--discovery-backend": LeftOut("etcd or redis by the registry's URL; without one, --role all keeps it in memory"),
    },
    VARIABLES,
    {"port": 8000, "policy": "round_robin"},
)
PROGRAMS = (WORKER, SGLANG_WORKER, FRONTEND)
