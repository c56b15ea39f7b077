"""What a file is that came in another's place, told by its keys or its name, and which command reads it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

MOST_READ = 1 << 20  # characters of a file, to tell what it is
YAML_KEY = re.compile(r"^(\w+):", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class FileKind:
    """`what` it is called; `read_by`: who reads it, where {file} and {folder} stand for its path and its folder's. `keys`: sets of keys,
    any of which tells it."""

    what: str
    read_by: str
    keys: tuple[frozenset[str], ...] = ()


def _kind(what: str, read_by: str, *keys: str) -> FileKind:
    return FileKind(what, read_by, tuple(frozenset(some.split()) for some in keys))


SUMMARY = _kind(
    "the summary of a run",
    "its experiment is {folder}/experiment.yaml, and pdlab compare reads its folder",
    "requests completed ttft_s",
)
EXPERIMENT = _kind("an experiment", "pdlab sim {file}", "model workload", "model cluster", "cluster workload")
TWO_WORLDS = _kind(
    "a file of layouts, policies and rates", "pdlab validate {file}", "experiment layouts", "experiment policies", "layouts policies"
)
INSTANCE_PROFILE = _kind(
    "a profile of pdlab calibrate", "name it as hardware of an instance: hardware: {file}", "machine engine steps", "schema_version steps"
)
STEP_TABLE = _kind("a table of step times", "name it in the experiment: cost: {{table: {file}}}", "prefill decode")
MODEL_CONFIG = _kind("a model's config.json", "pdlab models show {file}, or model: {file}", "model_type", "architectures", "text_config")
ADAPTER = _kind("an adapter", "give the config.json of the model that it adapts", "peft_type")
GENERATION = _kind("a generation_config.json", "give the config.json beside it, {folder}/config.json", "temperature", "do_sample")
TOKENIZER = _kind("a tokenizer's file", "give the config.json beside it, {folder}/config.json", "tokenizer_class", "added_tokens")
INDEX = _kind("an index of weights", "give the config.json beside it, {folder}/config.json", "weight_map")
ACCELERATORS = _kind("a file of accelerators", "pdlab sim EXPERIMENT --hardware-file {file}", "like", "hbm_gib bf16_tflops")
EVENT_LOG = _kind("an event log", "pdlab replay {file}", "pdlab policy_hash experiment", "pdlab scheduler")
VALIDATED = _kind(
    "the record of a pdlab validate", "pdlab validate FILE --out {folder} --again judges its runs", "machine versions experiments"
)
SWEPT = _kind("the record of a pdlab sweep", "the same pdlab sweep --out {folder} goes on with it", "experiment grid seeds")
TRACE = _kind(
    "a trace",
    "pdlab trace stats {file}, or workload: {{source: {file}}}",
    "prompt_tokens output_tokens",
    "input_length output_length",
    "benchmarks",
)
WEIGHTS = FileKind("a file of weights", "pdlab serve --model {file}")
PAGE = FileKind("a page", "open it in a browser; the experiment beside it is {folder}/experiment.yaml")
TABLE = FileKind("a table", "a run's experiment is {folder}/experiment.yaml; a trace is read by pdlab trace stats {file}")
POLICY = FileKind("a policy", "name its class in an experiment: policy: {file}:CLASS")

OF_A_MODEL = (ADAPTER, INDEX, TOKENIZER, GENERATION)
BY_KEYS = (
    ACCELERATORS,
    TWO_WORLDS,
    VALIDATED,
    SWEPT,
    EVENT_LOG,
    EXPERIMENT,
    SUMMARY,
    INSTANCE_PROFILE,
    STEP_TABLE,
    MODEL_CONFIG,
    *OF_A_MODEL,
    TRACE,
)
BY_ENDING = {
    **dict.fromkeys((".csv", ".jsonl", ".tsv", ".zst", ".gz"), TRACE),
    **dict.fromkeys((".yaml", ".yml"), EXPERIMENT),
    **dict.fromkeys((".gguf", ".safetensors"), WEIGHTS),
    **dict.fromkeys((".html", ".htm"), PAGE),
    ".parquet": TABLE,
    ".py": POLICY,
}


def kind_by_keys(content: Mapping[str, object]) -> FileKind | None:
    """What has such keys, if that is one of ours."""
    have = {key for key in content if isinstance(key, str)}
    kind = next((kind for kind in BY_KEYS if any(keys <= have for keys in kind.keys)), None)
    inner = [value for value in content.values() if isinstance(value, Mapping)]
    if kind is None and inner and len(inner) == len(content):  # by name
        return ACCELERATORS if all(kind_by_keys(value) is ACCELERATORS for value in inner) else None
    return kind


def kind_by_ending(path: Path) -> FileKind | None:
    return BY_ENDING.get(path.suffix.lower())


def kind_of_file(path: Path) -> FileKind | None:
    """By the keys of its first JSON value, or of a YAML file's lines; else by its name."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(MOST_READ).lstrip()
        if kind_by_ending(path) is EXPERIMENT and (kind := kind_by_keys(dict.fromkeys(YAML_KEY.findall(text)))):
            return kind
        content, _ = json.JSONDecoder().raw_decode(text)
    except (OSError, ValueError, RecursionError):
        return kind_by_ending(path)
    return kind_by_keys(content) if isinstance(content, dict) else None


def in_place_of(path: Path, kind: FileKind | None, wanted: FileKind) -> str:
    """A line where the file is another one's; empty where it is `wanted`, or nobody knows what it is."""
    if kind is None or kind is wanted:
        return ""
    return f"{path} is {kind.what}, not {wanted.what}: {kind.read_by.format(file=path, folder=path.parent)}"
