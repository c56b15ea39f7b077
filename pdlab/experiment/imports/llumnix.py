"""Llumnix' server and its launcher (versions on Ray): one command starts all instances."""

from __future__ import annotations

from pdlab.experiment.imports import vllm
from pdlab.experiment.imports.programs import LeftOut, Program, Sets, no, one_of, whole, words, yes

RAY = "pdlab serve starts processes on this machine; on several, one with --registry on each"

SERVER = Program(
    "Llumnix",
    "cluster",
    ("llumnix.entrypoints.vllm.api_server", "llumnix.entrypoints.vllm.serve", "llumnix.entrypoints.bladellm.server", "llumnix"),
    {
        **vllm.ENGINE_FLAGS,
        "--host": Sets("host"),
        "--port": Sets("port", whole),
        "--initial-instances": Sets("instances", whole),
        "--instance-num": Sets("instances", whole),
        "--enable-pd-disagg": Sets("disaggregated", yes, True),
        "--num-available-dispatch-instances": Sets("prefill", whole),
        "--num-dispatch-instances": Sets("prefill", whole),
        "--pd-ratio": Sets("ratio"),
        "--enable-scaling": Sets("scaling", yes, True),
        "--min-instances": Sets("min_instances", whole),
        "--max-instances": Sets("max_instances", whole),
        "--scale-up-threshold": LeftOut("no policy scales by freeness"),
        "--scale-down-threshold": LeftOut("no policy scales by freeness"),
        "--scaling-interval": LeftOut("no policy scales by freeness"),
        "--scaling-policy": LeftOut("no policy scales by freeness"),
        "--enable-migration": Sets("migration", yes, True),
        "--disable-migration": Sets("migration", no, False),
        "--dispatch-policy": Sets(
            "dispatch", one_of(load="llumnix", balanced="round_robin", queue="least_loaded", rr="round_robin", flood="least_loaded")
        ),
        "--pair-migration-policy": Sets(
            "pairing", one_of(balanced="balanced", defrag="defrag", defrag_constrained="defrag", defrag_relaxed="defrag")
        ),
        "--pair-migration-frequency": LeftOut("the policy's tick_s says how often migrations are paired"),
        "--migrate-out-threshold": Sets("migrate_out_threshold", float),
        "--request-migration-policy": Sets("request_order", one_of(sr="SR", lr="LR", lcr="LCR", sjf="SR", ljf="LR")),
        "--enable-defrag": Sets("defrag", yes, True),
        "--migration-backend": LeftOut("--kv-transport is auto: shared memory on a host, else NIXL where it is installed, else TCP"),
        "--migration-buffer-blocks": LeftOut("a migration copies in stages, and stops for 16 blocks at most"),
        "--max-migration-concurrency": LeftOut("an instance sends one request at a time"),
        "--launch-ray-cluster": LeftOut(RAY, switch=True),
        "--ray-cluster-port": LeftOut(RAY),
        "--launch-mode": LeftOut(RAY),
        "--head-node-ip": LeftOut(RAY),
        "--worker-use-ray": LeftOut(RAY, switch=True),
        "--request-output-queue-type": LeftOut("tokens come over the instance's own stream"),
        "--request-output-queue-port": LeftOut("tokens come over the instance's own stream"),
        "--polling-interval": LeftOut("instances report every cluster.reports.period_s"),
        "--instance-type": Sets("role", one_of(prefill="prefill", decode="decode", no_constraints="mixed", neutral="mixed")),
        "--dispatch-load-metric": LeftOut("the policy has its own measure"),
        "--log-instance-info": LeftOut("`pdlab status --watch` shows the instances"),
        "--log-filename": LeftOut("pdlab serve logs to stderr"),
    },
    {"CUDA_VISIBLE_DEVICES": Sets("visible", words)},
    {"port": 8000, "instances": 1, "block_tokens": 16, "migration": True, "transfer": "pull", "policy": "llumnix"},
)
PROGRAMS = (SERVER,)
