"""How much memory there is on this machine, and how much of it KV cache takes on a CPU. Knows no torch, so that it can be asked before
a process is started that loads it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from pdlab.core.kv_plan import copies
from pdlab.core.types import UsageError
from pdlab.real.engine.options import EngineOptions
from pdlab.real.models import config as configs
from pdlab.real.models.config import ModelConfig

GIB = 2**30
CGROUPS = Path("/sys/fs/cgroup")
V2, V1 = ("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")
ITEM_BYTES = {"auto": 4, "float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1, "fp8_e4m3": 1}  # on a CPU


def available_bytes(proc: Path = Path("/proc"), cgroups: Path = CGROUPS) -> int:
    """What a program may still take without swapping: the kernel's MemAvailable, which counts the page cache it would give up, or less
    where a control group (a container's limit) allows less."""
    return min((_machine_bytes(proc), *_group_bytes(proc, cgroups)))


def _machine_bytes(proc: Path) -> int:
    try:
        lines = dict(line.split(":", 1) for line in (proc / "meminfo").read_text(encoding="ascii").splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # no Linux, or one before 3.14
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _group_bytes(proc: Path, cgroups: Path) -> Iterator[int]:
    """What each limit on this process's own control group and on those above it leaves."""
    try:
        lines = (proc / "self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, files = (cgroups / "memory", V1) if controllers else (cgroups, V2)
        place = Path(path.lstrip("/"))
        for folder in (root / place, *(root / above for above in place.parents)):
            if (left := _left_bytes(folder, *files)) is not None:
                yield left


def _left_bytes(folder: Path, limit: str, usage: str) -> int | None:
    """The group's limit less what it uses, but for file pages, which the kernel drops first. None: it has no limit."""
    try:
        most, used = int((folder / limit).read_text()), int((folder / usage).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # "max" is no number
        return None
    return max(0, most - used + int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0)))


def kv_item_bytes(options: EngineOptions) -> int:
    """Of an element of KV, on a CPU."""
    return ITEM_BYTES.get(options.dtype if options.kv_cache_dtype == "auto" else options.kv_cache_dtype, 4)


def block_bytes(options: EngineOptions, config: ModelConfig, item_bytes: int) -> int:
    return config.kv_bytes_per_token(item_bytes) * options.block_tokens


def draft_config(options: EngineOptions, served: ModelConfig) -> ModelConfig:
    """Of the model that drafts. Raises UsageError where it cannot draft for the one that is served."""
    assert options.speculation is not None
    model = options.speculation.model
    config = configs.of(model, random=options.random)
    if config.vocab != served.vocab:
        raise UsageError(f"speculative model {model} has a vocabulary of {config.vocab} tokens, and {served.name} one of {served.vocab}")
    context = min(options.max_model_len or served.max_positions, served.max_positions)
    if config.max_positions < context:
        raise UsageError(
            f"speculative model {model} has {config.max_positions} positions only: give --max-model-len {config.max_positions}, or another"
        )
    return config


def draft_block_bytes(options: EngineOptions, config: ModelConfig, item_bytes: int) -> int:
    """What a block takes of the memory of a model that drafts for `config`; 0: there is none. At rank 0."""
    if options.speculation is None or not options.speculation.model:
        return 0
    return block_bytes(options, draft_config(options, config), item_bytes)


def cpu_kv_blocks(options: EngineOptions, config: ModelConfig, item_bytes: int) -> int:
    """As asked for; else room for four contexts, but at most 1 GiB."""
    size = block_bytes(options, config, item_bytes) + draft_block_bytes(options, config, item_bytes)
    if options.kv_blocks:
        return options.kv_blocks
    if options.kv_gib:
        return int(options.kv_gib * GIB / size)
    context = min(options.max_model_len or config.max_positions, config.max_positions)
    return min(int(GIB / size), 4 * -(-context // options.block_tokens))


def check_cpu_kv(*engines: EngineOptions) -> None:
    """Raises UsageError where the KV memory of these engines, all on this machine's CPU, exceeds what is available, or where a model cannot
    be split as asked."""
    needed = 0
    for options in engines:
        config, item_bytes = configs.of(options.model, random=options.random), kv_item_bytes(options)
        configs.check_tp(config, options.tp, options.ep)
        if options.device == "cpu":
            block = block_bytes(options, config, item_bytes) * copies(config.kv_heads, options.tp)
            drafts = 0 if options.node_rank else draft_block_bytes(options, config, item_bytes)
            needed += cpu_kv_blocks(options, config, item_bytes) * (block // options.nnodes + drafts)
    if needed > (available := available_bytes()):
        whose = f" for {len(engines)} instances" if len(engines) > 1 else ""
        raise UsageError(
            f"KV memory of {needed / GIB:.1f} GiB{whose} exceeds the {available / GIB:.1f} GiB that are available here: "
            "give less with --kv-gib"
        )
