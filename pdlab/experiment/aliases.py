"""The seeds' names for options of `pdlab serve`: xLLM's gflags and FastDeploy's, taken where they mean the same.

What a flag means is told by the tables that `pdlab import` reads commands by. Underscores and dashes are alike in all flags.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

from pdlab.core.types import UsageError
from pdlab.experiment.imports import fastdeploy, vllm, xllm
from pdlab.experiment.imports.programs import LeftOut, Meaning, Sets, no

OWN = frozenset(  # which are options of pdlab serve themselves
    (
        *("--model", "--port", "--host", "--tokenizer", "--tokenizer-path", "--dtype", "--quantization", "--served-model-name"),
        *("--max-model-len", "--max-num-seqs", "--max-num-batched-tokens", "--block-size", "--gpu-memory-utilization", "--metrics-port"),
        *("--num-gpu-blocks-override", "--data-parallel-size", "--tensor-parallel-size"),
        *("--nnodes", "--node-rank", "--master-node-addr"),  # and those that `spellings` has a line for
    )
)
_CACHE = ("--enable-prefix-caching", "--no-enable-prefix-caching", "--enable-chunked-prefill")
ALIASES: dict[str, Meaning] = {
    flag: meaning
    for flags in ({name: vllm.ENGINE_FLAGS[name] for name in _CACHE}, fastdeploy.API_SERVER.flags, xllm.SERVICE.flags, xllm.ENGINE.flags)
    for flag, meaning in flags.items()
    if flag not in OWN
} | {
    "--disable-radix-cache": Sets("prefix_cache", no, False),
}
VALUES = {
    "role": "--role",
    "registry": "--registry",
    "port": "--port",
    "host": "--host",
    "device": "--device",
    "kv_port": "--kv-port",
    "transport": "--kv-transport",
    "request_timeout_s": "--request-timeout-s",
    "max_in_flight": "--max-requests",
    "hbm_utilization": "--hbm-utilization",
    "max_batch_tokens": "--max-batch-tokens",
    "max_seqs": "--max-seqs",
    "served_name": "--served-model-name",
    "block_tokens": "--block-tokens",
}
SWITCHES: dict[str, Callable[[object], list[str]]] = {
    "experts_whole": lambda held: ["--enable-expert-parallel"] if held else [],
    "prefix_cache": lambda held: ["--prefix-cache" if held else "--no-prefix-cache"],
    "chunked": lambda held: ["--batching", "chunked" if held else "prefill_first"],
}
ALREADY = {"disaggregated": True, "scheduler": "splitwise", "tp": 1, "nodes": 1}  # so it is, and nothing is to be said
REDIS = ("redis_host", "redis_port", "redis_db")
KEYS = {
    "policy": "policy",
    "response_path": "transfer.response_path",
    "transfer": "transfer.mode",
    "lease_s": "limits.lease_s",
    "slo_ttft_s": "slo.ttft_s",
    "slo_tpot_s": "slo.tpot_s",
    "report_s": "cluster.reports.period_s",
    "suspect_s": "limits.suspect_s",
    "kv_blocks": "engine.kv_blocks",
    "namespace": "registry, as redis://host:6379?namespace=NAME",
    "count": "cluster.instances (count)",
}


def translated(arguments: Sequence[str]) -> list[str]:
    """The arguments of `pdlab serve` with the seeds' names replaced by its own. Raises UsageError for one that cannot be."""
    if not arguments or arguments[0] != "serve":
        return list(arguments)
    return ["serve", *_replaced([_dashed(word) for word in arguments[1:]])]


def _dashed(word: str) -> str:
    flag, equals, value = word.partition("=")
    return f"{flag.replace('_', '-')}{equals}{value}" if re.fullmatch(r"--[A-Za-z][\w-]*", flag) else word


def _replaced(words: Sequence[str]) -> Iterator[str]:
    redis: dict[str, object] = {}
    at = 0
    while at < len(words):
        flag, equals, value = words[at].partition("=")
        meaning = ALIASES.get(flag)
        if meaning is None:
            yield words[at]
            at += 1
            continue
        at += 1
        takes = isinstance(meaning, LeftOut) or meaning.const is None or (at < len(words) and words[at].lower() in ("true", "false"))
        if not equals and takes and at < len(words) and not words[at].startswith("--"):
            value = words[at]
            at += 1
        yield from _one(flag, meaning, value, redis)
    if redis:
        database = redis.get("redis_db")
        yield from ("--registry", f"redis://{redis.get('redis_host', '127.0.0.1')}:{redis.get('redis_port', 6379)}")
        if database:
            raise UsageError(f"--scheduler-db {database}: give --registry redis://host:6379/{database}")


def _one(flag: str, meaning: Meaning, value: str, redis: dict[str, object]) -> list[str]:
    if isinstance(meaning, LeftOut):
        raise UsageError(f"{flag}: {meaning.why}: remove it (pdlab import reads a whole command)")
    taken = _value(flag, meaning, value)
    setting = meaning.setting
    if setting in REDIS:
        redis[setting] = taken
        return []
    if setting in SWITCHES:
        return SWITCHES[setting](taken)
    if setting in VALUES:
        return [VALUES[setting], str(taken)]
    if setting == "kv_ports" and isinstance(taken, tuple) and len(taken) == 1:
        return ["--kv-port", str(taken[0])]
    if setting in ALREADY and taken == ALREADY[setting]:
        return []
    raise UsageError(f"{flag}: {_instead(setting, meaning)}")


def _value(flag: str, meaning: Sets, value: str) -> object:
    if not value and meaning.const is not None:
        return meaning.const
    if not value:
        raise UsageError(f"{flag} needs a value")
    try:
        return meaning.read(value)
    except ValueError as error:
        raise UsageError(f"{flag} {value!r} {error}") from None


def _instead(setting: str, meaning: Sets) -> str:
    if setting in KEYS:
        return f"write it into the experiment file: {KEYS[setting]}"
    if setting == "kv_ports":
        return "an instance has one port for KV: give --kv-port"
    if setting == "disaggregated":
        return "give --role mixed in place of it"
    return f"{meaning.why or 'pdlab serve has nothing of the kind'}: remove it (pdlab import reads a whole command)"
