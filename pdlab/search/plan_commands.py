"""How a planned deployment is started: the experiment file of it, pdlab's commands, and vLLM's.

vLLM's flags are those of its `serve`; tests/interop checks them against vLLM's own parser.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from pdlab import batching
from pdlab.core.types import Role
from pdlab.experiment import spellings
from pdlab.experiment.cluster import Placement
from pdlab.experiment.experiment import Experiment

NIXL = {"kv_connector": "NixlConnector", "kv_role": "kv_both"}
VLLM_PORT, PDLAB_PORT, SIDE_PORT = 8200, 8100, 5600
REGISTRY = "etcd://registry:2379"


@dataclass(frozen=True, slots=True)
class StartedInstance:
    """One instance: its host, the accelerators that it has there, and what starts it."""

    placement: Placement
    first_device: int

    @property
    def devices(self) -> str:
        return ",".join(str(self.first_device + k) for k in range(self.placement.accelerators))

    @property
    def vllm_port(self) -> int:
        return VLLM_PORT + self.first_device

    @property
    def pdlab_port(self) -> int:
        return PDLAB_PORT + self.first_device


def started(experiment: Experiment) -> list[StartedInstance]:
    """Each instance with its own accelerators, counted from 0 on each host."""
    taken: dict[str, int] = {}
    found = []
    for placement in experiment.placements():
        first = taken.get(placement.host, 0)
        taken[placement.host] = first + placement.accelerators
        found.append(StartedInstance(placement, first))
    return found


def checkpoint(experiment: Experiment) -> str:
    """What vLLM calls the model; MODEL where the file has a catalogue's name, which is no checkpoint's."""
    if spellings.of_hub(experiment.model):
        return experiment.model
    folder = experiment.base_dir / experiment.model
    if experiment.model.endswith("config.json"):
        return str(folder.parent)
    return str(folder) if folder.is_dir() else "MODEL"


def vllm_arguments(experiment: Experiment, one: StartedInstance) -> list[str]:
    """After `vllm`."""
    engine = one.placement.engine
    words = ["serve", checkpoint(experiment), "--host", "0.0.0.0", "--port", str(one.vllm_port)]
    words += ["--tensor-parallel-size", str(one.placement.parallel.tp)]
    words += ["--max-num-batched-tokens", str(engine.max_batch_tokens), "--max-num-seqs", str(engine.max_seqs)]
    words += ["--gpu-memory-utilization", f"{engine.hbm_utilization:g}", "--block-size", str(engine.block_tokens)]
    words += ["--enable-prefix-caching" if engine.prefix_cache else "--no-enable-prefix-caching"]
    words += [] if engine.batching == "chunked" else ["--no-enable-chunked-prefill"]
    words += [] if engine.max_model_len is None else ["--max-model-len", str(engine.max_model_len)]
    words += [] if experiment.dtype == "auto" else ["--dtype", experiment.dtype]
    words += ["--kv-cache-dtype", "fp8"] if "fp8" in experiment.formats.kv else []
    words += [] if one.placement.role is Role.MIXED else ["--kv-transfer-config", json.dumps(NIXL)]
    return words


def vllm_command(experiment: Experiment, one: StartedInstance) -> str:
    """A line of a shell on the instance's host."""
    told = {"CUDA_VISIBLE_DEVICES": one.devices}
    if one.placement.role is not Role.MIXED:
        told |= {"VLLM_NIXL_SIDE_CHANNEL_HOST": one.placement.host, "VLLM_NIXL_SIDE_CHANNEL_PORT": str(SIDE_PORT + one.first_device)}
    return f"{' '.join(f'{name}={value}' for name, value in told.items())} vllm {shlex.join(vllm_arguments(experiment, one))}"


def pdlab_arguments(experiment: Experiment, one: StartedInstance, file: str, *, native: bool) -> list[str]:
    """After `pdlab`: of its own engine, or of the sidecar of a vLLM server."""
    words = ["serve", file, "--role", str(one.placement.role), "--instance-name", one.placement.name, "--registry", REGISTRY]
    words += ["--host", "0.0.0.0", "--port", str(one.pdlab_port), "--advertise", one.placement.host]
    if native:
        return [*words, "--model", checkpoint(experiment), "--device", f"cuda:{one.first_device}"]
    return [*words, "--engine", "vllm", "--upstream", f"http://{one.placement.host}:{one.vllm_port}"]


def router_arguments(file: str) -> list[str]:
    return ["serve", file, "--role", "router", "--registry", REGISTRY, "--host", "0.0.0.0", "--port", "8000"]


def script(experiment: Experiment, file: str) -> str:
    """Every command, by host."""
    return "\n".join(_lines(experiment, file)) + "\n"


def _lines(experiment: Experiment, file: str) -> Iterator[str]:
    instances = started(experiment)
    yield f"# {experiment.name}: every command, on the host that it is for. {REGISTRY} is where instances and routers meet."
    yield "# Hosts are named host-0, host-1, ...: let these names resolve, or write addresses."
    yield "# Beyond loopback a token is needed: PDLAB_INTERNAL_TOKEN_FILE, the same everywhere (docs/guides/security.md)."
    if checkpoint(experiment) == "MODEL":
        yield f"# MODEL: the folder of the checkpoint of {experiment.model}, or vLLM's name for it."
    yield from caveats(experiment)
    yield ""
    yield "# 1. vLLM as the engine, with a sidecar of pdlab beside each server"
    for host in dict.fromkeys(one.placement.host for one in instances):
        yield f"# on {host}"
        for one in instances:
            if one.placement.host == host:
                yield vllm_command(experiment, one)
                yield f"pdlab {shlex.join(pdlab_arguments(experiment, one, file, native=False))}"
    yield f"pdlab {shlex.join(router_arguments(file))}"
    yield ""
    if all(one.placement.accelerators == 1 for one in instances):
        yield "# 2. or pdlab's own engine"
        for one in instances:
            yield f"pdlab {shlex.join(pdlab_arguments(experiment, one, file, native=True))}"
        yield f"pdlab {shlex.join(router_arguments(file))}"
    else:
        yield "# 2. pdlab's own engine runs an instance on one accelerator; these have more"


def caveats(experiment: Experiment) -> Iterator[str]:
    """What vLLM does otherwise than was simulated."""
    apart = len({p.role for p in experiment.placements()}) > 1
    if apart and experiment.transfer.mode == "push":
        yield "# vLLM's NixlConnector pulls, and sets no blocks aside before prefill; what was simulated pushes."
    batchings = {batching.split(p.engine.batching)[0] for p in experiment.placements()}
    if "decode_first" in batchings:
        yield "# vLLM has no batching decode_first."
    if "prefill_first" in batchings:
        yield "# Without chunked prefill vLLM wants --max-num-batched-tokens of at least its --max-model-len."
    if experiment.quantization is not None:
        yield f"# quantization {experiment.quantization} is pdlab's; take a checkpoint that is quantised so."
