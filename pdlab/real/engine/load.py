"""From a folder or a file to an engine that runs: config, weights, KV memory, scheduler. All mistakes are UsageErrors of one line."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pdlab.core.types import Lines, UsageError
from pdlab.core.worker import Worker
from pdlab.kernels.fp8 import E4M3
from pdlab.kernels.linear import NarrowWeight
from pdlab.real.engine.engine import Engine
from pdlab.real.engine.graphs import GraphRunner
from pdlab.real.engine.memory import GIB, available_bytes, check_cpu_kv, cpu_kv_blocks, draft_config
from pdlab.real.engine.options import EngineOptions
from pdlab.real.engine.passes import Tell
from pdlab.real.engine.runner import Runner
from pdlab.real.engine.speculation import Speculation
from pdlab.real.models import config as configs
from pdlab.real.models import gguf_file, weights
from pdlab.real.models.config import ModelConfig
from pdlab.real.models.linear import bfloat16_products, maker
from pdlab.real.models.model import ALONE, DecoderModel
from pdlab.real.models.ranks import Ranks
from pdlab.replay.scheduler_log import Recorded, Setup

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KV_DTYPES: dict[str, torch.dtype] = {"fp8": E4M3, "fp8_e4m3": E4M3, **DTYPES}
FP8_CAPABILITY = (8, 9)  # of the least NVIDIA GPU that has it
ENDS = 1 << 16
WEIGHT_BYTES = {"wint8": 1.0, "wint4": 0.625}  # on average at least, of a weight


@dataclass(frozen=True, slots=True)
class Loaded:
    config: ModelConfig
    engine: Engine
    device: torch.device
    dtype: torch.dtype
    kv_dtype: torch.dtype
    fingerprint: str  # equal for two engines that compute the same KV
    context_tokens: int  # of prompt and output, at most


def device_of(name: str) -> torch.device:
    """`cpu`, `cuda`, `cuda:1`, `npu:0`. Raises UsageError where there is no such device here."""
    if not re.fullmatch(r"(cpu|(cuda|npu)(:\d+)?)", name):
        raise UsageError(f"--device {name} is not one of cpu, cuda, cuda:N, npu, npu:N")
    kind, _, index = name.partition(":")
    if kind == "npu":
        try:
            import torch_npu  # noqa: F401 - registers the device
        except ImportError:
            raise UsageError(
                f"--device {name} needs torch_npu, which is not installed: install Ascend's torch_npu, or use --device cpu"
            ) from None
    if kind != "cpu":
        module = getattr(torch, kind)
        if not module.is_available():
            raise UsageError(f"--device {name}: torch sees no {kind} device here; use --device cpu")
        if int(index or 0) >= module.device_count():
            raise UsageError(f"--device {name}: there are {module.device_count()} {kind} devices, numbered from 0")
    return torch.device(kind, int(index or 0)) if kind != "cpu" else torch.device("cpu")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """One rank's part of a model. `kv_blocks`: as many as all ranks have memory for."""

    model: DecoderModel
    kv_dtype: torch.dtype
    kv_blocks: int
    context_tokens: int
    drafts: DecoderModel | None = None  # at rank 0, which has all of it

    def runner(self, options: EngineOptions, tell: Tell | None = None) -> Runner:
        """`tell` hears of each pass before it is run. Decode steps of a CUDA device's one rank go through graphs."""
        kinds: dict[str, Any] = {"tell": tell, "kv_blocks": self.kv_blocks, "block_tokens": options.block_tokens}
        kinds |= {"kv_dtype": self.kv_dtype, "shared": bool(options.kv_name), "step_tokens": options.max_batch_tokens}
        if self.model.device.type == "cuda" and self.model.ranks.size == 1:
            return GraphRunner(self.model, max_tokens=self.context_tokens, max_seqs=options.max_seqs, **kinds)
        return Runner(self.model, **kinds)

    def speculation(self, options: EngineOptions) -> Speculation | None:
        """None: nothing is drafted."""
        if options.speculation is None:
            return None
        drafts = None
        if self.drafts is not None:
            drafts = Runner(
                self.drafts,
                kv_blocks=self.kv_blocks,
                block_tokens=options.block_tokens,
                kv_dtype=self.kv_dtype,
                step_tokens=options.max_batch_tokens,
            )
        return Speculation.of(options.speculation, drafts, options.max_batch_tokens)


def load_model(options: EngineOptions, device: torch.device, ranks: Ranks = ALONE) -> LoadedModel:
    """What one rank computes with."""
    if device.type == "cpu" and options.rank_threads:
        torch.set_num_threads(options.rank_threads)
    path = Path(options.model)
    config = configs.of(options.model, random=options.random)
    configs.check_tp(config, options.tp, options.ep)
    chunk = max(config.windows) if config.chunked is not None else 0
    if chunk % options.block_tokens:
        raise UsageError(f"--block-tokens {options.block_tokens} does not divide attention_chunk_size {chunk} of {config.name}: choose one")
    narrow = device.type == "cuda" and not options.quantization  # whose kernels read them as they are
    found, factors = _source(path, config, options, ranks, narrow_experts=narrow)
    dtype = _dtype(options.dtype, config, device)
    kv_dtype = _kv_dtype(options, dtype, device)
    context = min(options.max_model_len or config.max_positions, config.max_positions)
    if options.max_model_len > config.max_positions:
        raise UsageError(f"--max-model-len {options.max_model_len} exceeds the model's {config.max_positions} positions")
    if device.type == "cpu" and dtype == torch.bfloat16 and not bfloat16_products():
        log.warning("this CPU cannot multiply bfloat16 (it has no AVX-512): prompts are computed in float32, at about its speed")
    if device.type == "cpu":
        _check_weights(config, dtype, options.quantization, ranks)
    make = maker(options.quantization, pack=_packs(config, device, dtype, len(options.ranks_here) / ranks.size))
    model = DecoderModel(config, found, device=device, dtype=dtype, max_positions=context, make=make, rope_factors=factors, ranks=ranks)
    drafts = _drafts(options, config, context, device, dtype) if ranks.rank == 0 else None
    blocks = _kv_blocks(options, model, drafts, kv_dtype.itemsize)
    if ranks.size > 1:
        blocks = -int(ranks.most(torch.tensor([-blocks], device=device)).item())
    return LoadedModel(model, kv_dtype, blocks, context, drafts)


def _drafts(options: EngineOptions, served: ModelConfig, context: int, device: torch.device, dtype: torch.dtype) -> DecoderModel | None:
    """The model that drafts, where one is asked for."""
    if options.speculation is None or not options.speculation.model:
        return None
    config = draft_config(options, served)
    found, factors = _source(Path(options.speculation.model), config, options, ALONE)
    make = maker("", pack=_packs(config, device, dtype, 1.0))
    return DecoderModel(config, found, device=device, dtype=dtype, max_positions=context, make=make, rope_factors=factors)


def load(options: EngineOptions, decisions: Lines | None = None, ranks: Ranks = ALONE, tell: Tell | None = None) -> Loaded:
    """Everything in place to run `engine.step`. With more `ranks`, this is rank 0, and each pass is told to the others."""
    device = device_of(options.device_of_rank(ranks.rank))
    loaded = load_model(options, device, ranks)
    config, context = loaded.model.config, loaded.context_tokens
    setup = Setup(
        loaded.kv_blocks,
        options.block_tokens,
        options.max_batch_tokens,
        options.max_seqs,
        options.batching,
        options.prefix_cache,
        options.watermark,
    )
    scheduler = setup.scheduler()
    recorded = None if decisions is None else Recorded(setup, scheduler, decisions)
    worker = Worker(scheduler, recorded, context_tokens=context, lease_s=options.lease_s)
    engine = Engine(
        loaded.runner(options, tell),
        worker,
        eos_ids=frozenset(options.eos_ids),
        seed=options.seed,
        ttft_slo_s=options.ttft_slo_s,
        tpot_slo_s=options.tpot_slo_s,
    )
    engine.speculation = loaded.speculation(options)
    return Loaded(config, engine, device, loaded.model.dtype, loaded.kv_dtype, fingerprint_of(config, options), context)


def fingerprint_of(config: ModelConfig, options: EngineOptions) -> str:
    """Of the architecture, the quantisation, and the weights: random ones by their seed, files by size and by both their ends."""
    path = Path(options.model)
    found = hashlib.sha256(f"{dataclasses.replace(config, name='')} {options.quantization}".encode())
    if options.random:
        found.update(f"random {options.seed}".encode())
        return found.hexdigest()[:16]
    for file in [path] if path.is_file() else sorted(path.glob("*.safetensors")):
        size = file.stat().st_size
        found.update(f"{size}".encode())
        with file.open("rb") as content:
            found.update(content.read(ENDS))
            content.seek(max(0, size - ENDS))
            found.update(content.read(ENDS))
    return found.hexdigest()[:16]


def _source(
    path: Path, config: ModelConfig, options: EngineOptions, ranks: Ranks, *, narrow_experts: bool = False
) -> tuple[Iterator[tuple[str, Tensor | NarrowWeight]], Tensor | None]:
    """A rank's weights by their Hugging Face names, and what divides the rotary frequencies."""
    if path.suffix == ".gguf":
        factors = gguf_file.rope_factors(path)
        arrays = ((name, torch.from_numpy(array)) for name, array in gguf_file.tensors(path))
        return weights.parts(arrays, config, ranks), None if factors is None else torch.from_numpy(factors)
    if options.random:
        return weights.parts(weights.at_random(config, options.seed), config, ranks), None
    return weights.from_folder(path, config, ranks, narrow_experts=narrow_experts), None


def _dtype(name: str, config: ModelConfig, device: torch.device) -> torch.dtype:
    if name == "auto":
        name = config.dtype if device.type != "cpu" else "float32"
        name = {"float16": "float16", "bfloat16": "bfloat16"}.get(name, "float32")
    if name not in DTYPES:
        raise UsageError(f"--dtype {name} is not one of auto, {', '.join(DTYPES)}")
    if name == "float16" and device.type == "cpu":
        raise UsageError("--dtype float16 is for accelerators; on a CPU use float32 or bfloat16")
    return DTYPES[name]


def _kv_dtype(options: EngineOptions, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Of KV, beside what is computed in `dtype`."""
    name, computed = options.kv_cache_dtype, str(dtype).removeprefix("torch.")
    if name == "auto":
        return dtype
    if name not in KV_DTYPES:
        raise UsageError(f"--kv-cache-dtype {name} is not one of auto, {', '.join(KV_DTYPES)}")
    kv_dtype = KV_DTYPES[name]
    if kv_dtype != dtype and kv_dtype.itemsize >= dtype.itemsize:
        raise UsageError(f"--kv-cache-dtype {name} is no narrower than {computed}, which is computed in: give --dtype {name} too, or auto")
    if name == "float16" and device.type == "cpu":
        raise UsageError("--kv-cache-dtype float16 is for accelerators; on a CPU use fp8, bfloat16 or float32")
    if device.type == "npu" and kv_dtype != dtype:
        raise UsageError(f"--kv-cache-dtype {name}: on an NPU KV has the dtype of --dtype, {computed}: give auto")
    if kv_dtype == E4M3 and device.type == "cuda" and (found := torch.cuda.get_device_capability(device)) < FP8_CAPABILITY:
        raise UsageError(f"--kv-cache-dtype {name} needs a GPU of compute capability 8.9 or more; {device} has {found[0]}.{found[1]}")
    if kv_dtype == E4M3 and not options.random and (scales := weights.kv_scales(Path(options.model))):
        log.warning("%s and %d more scales of KV in %s are ignored: KV has a scale of 1", scales[0], len(scales) - 1, options.model)
    return kv_dtype


def _check_weights(config: ModelConfig, dtype: torch.dtype, quantization: str, ranks: Ranks) -> None:
    """Raises UsageError where a rank's part of the weights exceeds the memory that is available."""
    each = WEIGHT_BYTES.get(quantization, dtype.itemsize)
    needed = each * sum(math.prod(shape) for shape in weights.shapes(config).values()) / ranks.size
    if needed > (available := available_bytes()):
        raise UsageError(
            f"weights of {needed / GIB:,.0f} GiB exceed the {available / GIB:.1f} GiB that are available here: "
            "give a smaller model, or --quantization wint4"
        )


def _packs(config: ModelConfig, device: torch.device, dtype: torch.dtype, part: float) -> bool:
    """Is there a library that orders weights, and memory to keep the `part` of them that is here twice?"""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if dtype == torch.bfloat16 and not bfloat16_products():
        return False
    needed = 2 * dtype.itemsize * sum(math.prod(shape) for shape in weights.shapes(config).values())
    return needed * part < 0.7 * available_bytes()


def _kv_blocks(options: EngineOptions, model: DecoderModel, drafts: DecoderModel | None, item_bytes: int) -> int:
    """As asked for; else, on a CPU, what `cpu_kv_blocks` says; on an accelerator, `hbm_utilization` less what is taken. `item_bytes`: of an
    element of KV."""
    device = model.device
    token_bytes = model.share.kv_bytes_per_token(item_bytes) + (drafts.config.kv_bytes_per_token(item_bytes) if drafts is not None else 0)
    block_bytes = token_bytes * options.block_tokens
    if device.type == "cpu":
        if model.ranks.rank == 0:
            check_cpu_kv(options)
        blocks = cpu_kv_blocks(options, model.config, item_bytes)
    elif options.kv_blocks:
        blocks = options.kv_blocks
    elif options.kv_gib:
        blocks = int(options.kv_gib * GIB / block_bytes)
    else:
        free, total = getattr(torch, device.type).mem_get_info(device)
        blocks = int((free - (1 - options.hbm_utilization) * total) / block_bytes)
    if blocks < 2:
        raise UsageError(
            f"KV memory for {max(blocks, 0)} blocks of {block_bytes / 2**20:.1f} MiB is too small to serve anything: "
            f"give at least --kv-gib {4 * block_bytes / GIB:.3f}"
        )
    return blocks
