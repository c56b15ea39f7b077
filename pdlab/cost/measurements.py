"""Tables of measured servers: one row is the mean TTFT and TPOT of one closed loop. `pdlab board` scores them.

The format is a CSV with these columns; the first eight are needed, others may be missing or empty:

    model_path             a name of the catalogue, or of a hub: nvidia/DeepSeek-R1-NVFP4
    system                 an accelerator of the catalogue: h100_sxm, or h100-sxm
    backend                vllm, sglang, trtllm or pdlab
    isl, osl               nominal prompt and output tokens; a request's own are drawn from 0.8 to 1 of them
    concurrency            requests always in flight
    silicon_ttft_ms, silicon_tpot_ms       means over the run
    id, backend_version
    mode                   agg, or disagg: prefill and decode apart
    precision              of the weights: bf16, fp8, fp4; empty: as the model is published
    kv_precision           of the KV cache: bf16, fp8; empty: what the backend takes by default
    launch                 default: with the engine's defaults; empty: as `pdlab.cost.launches` knows servers of these models and lengths
    mtp_tokens             drafted in a step by multi-token prediction; empty: none
    tp_size, pp_size, attention_dp_size, moe_tp_size, moe_ep_size       of an aggregated server
    prefill_*, decode_*    the same of each side, with prefill_num_workers and decode_num_workers

A table of aiconfigurator's has ways of its own, which are read as what they mean. Where attention data parallelism is listed beside
tp_size, both multiply to the accelerators. An aggregated row whose experts are listed n x n beside n^2 accelerators ran on n. SGLang's
data-parallel attention goes with expert parallelism, however its experts are listed.

Its disaggregated rows were launched by public recipes (NVIDIA/srt-slurm, recipes/), which say otherwise in three places. SGLang's rows of
0.5.5 list data-parallel attention everywhere: servers of four GB200 are tensor parallel, but for prefillers of short prompts before a wider
server. SGLang's data-parallel attention has no all-to-all on B200: it gathers all ranks' tokens, as without expert parallelism.
TensorRT-LLM's prefillers of DeepSeek in fp8 on B200 are listed with and without expert parallelism, of one run: they have none.

It does not mark multi-token prediction. TensorRT-LLM's rows of DeepSeek-R1 fall into two kinds, a factor of 1.3 to 2.1 apart at equal
set-ups. The quicker ones are of version 1.2.0rc6.post3, and of 1.1.0rc2.post2 where the model is called R1. They are taken to draft 3
tokens, or 1 under data-parallel attention, as their public recipes do. That is inferred, not said by the table.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pdlab.core.types import UsageError
from pdlab.cost.catalogue import hardware, model
from pdlab.cost.hardware import Hardware
from pdlab.cost.parallel import Parallel
from pdlab.cost.shapes import Model

NEEDED = ("model_path", "system", "backend", "isl", "osl", "concurrency", "silicon_ttft_ms", "silicon_tpot_ms")
BACKENDS = ("vllm", "sglang", "trtllm", "pdlab")
SHORTEST_SHARE = 0.8  # of nominal lengths
_DTYPES = {"fp4": "nvfp4", "nvfp4": "nvfp4", "fp8": "fp8", "fp8_block": "fp8", "bf16": "bf16", "fp16": "bf16", "int4": "wint4"}
_ALIASES = {"conc": "concurrency"}  # in older tables
_DRAFTING = ("1.1.0rc2.post2", "1.2.0rc6.post3")
_SUFFIXES = ("-nvfp4", "-fp8", "-fp4", "-bf16", "-mxfp4", "-it")


@dataclass(frozen=True, slots=True)
class Side:
    """Like servers that do the same: `role` is mixed, prefill or decode."""

    role: str
    workers: int
    parallel: Parallel

    @property
    def gpus(self) -> int:
        return self.workers * self.parallel.gpus


@dataclass(frozen=True, slots=True)
class MeasuredRow:
    """One row. Times in seconds, lengths nominal, in tokens."""

    id: str
    model_name: str
    hardware_name: str
    engine: str
    version: str
    weight_dtype: str | None  # None: as published
    kv_dtype: str
    mtp_tokens: int
    sides: tuple[Side, ...]
    concurrency: int
    prompt_tokens: int
    output_tokens: int
    ttft_s: float
    tpot_s: float
    as_default: bool = False  # the table says so: its server was launched with its engine's defaults

    @property
    def disaggregated(self) -> bool:
        return len(self.sides) > 1

    @property
    def gpus(self) -> int:
        return sum(side.gpus for side in self.sides)

    @property
    def setup(self) -> str:
        """The configuration: what was served on what and how, at whatever lengths and concurrency. It is held out as a whole."""
        sides = " ".join(f"{side.role}:{side.workers}x({side.parallel})" for side in self.sides)
        return f"{self.model_name} {self.hardware_name} {self.engine} {self.version} {self.weight_dtype} {sides}"

    @property
    def tokens_per_s_per_gpu(self) -> float:
        return throughput_per_gpu(self, self.ttft_s, self.tpot_s)

    def model(self) -> Model:
        return model(self.model_name)

    def hardware(self) -> Hardware:
        return hardware(self.hardware_name)


def throughput_per_gpu(row: MeasuredRow, ttft_s: float, tpot_s: float) -> float:
    """Output tokens a second and accelerator of a closed loop, by Little's law: concurrency * n / (TTFT + (n - 1) TPOT), with n tokens
    of output in the mean."""
    output = row.output_tokens * (1 + SHORTEST_SHARE) / 2
    return row.concurrency * output / (ttft_s + max(0.0, output - 1) * tpot_s) / row.gpus


def read_rows(path: Path) -> tuple[list[MeasuredRow], list[tuple[str, str]]]:
    """The rows, and (id, reason) of those that say too little to be simulated, or that name what the catalogue lacks.
    Raises UsageError when the file can't be read or lacks a column."""
    try:
        with path.open(encoding="utf-8", newline="") as lines:
            reader = csv.DictReader(lines)
            there = {_ALIASES.get(name, name) for name in reader.fieldnames or ()}
            missing = [name for name in NEEDED if name not in there]
            table = [{_ALIASES.get(key, key): value for key, value in line.items()} for line in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"measurements {path}: {getattr(error, 'strerror', None) or error}") from None
    if missing:
        raise UsageError(f"measurements {path}: the table lacks {', '.join(missing)}; docs/guides/board.md has the format")
    rows, left_out = [], []
    for number, line in enumerate(table, start=2):
        try:
            rows.append(_row(line, number))
        except UsageError as error:
            left_out.append((line.get("id") or f"line {number}", str(error)))
    return rows, left_out


def of_models(measured: list[MeasuredRow], names: list[str]) -> list[MeasuredRow]:
    """Those rows alone; all, where no model is named. Raises UsageError."""
    if not names:
        return measured
    wanted = {name.lower().rsplit("/", 1)[-1] for name in names}
    there = {row.model_name for row in measured}
    if strange := sorted(wanted - there):
        raise UsageError(f"--model {strange[0]}: the table has {', '.join(sorted(there)) or 'no model that is known'}")
    return [row for row in measured if row.model_name in wanted]


def _row(line: Mapping[str, str], number: int) -> MeasuredRow:
    engine = line["backend"].strip().lower()
    if engine not in BACKENDS:
        raise UsageError(f"backend {engine!r} is none of {', '.join(BACKENDS)}")
    name, chip = _model_name(line["model_path"]), hardware(line["system"].strip()).name
    precision = (line.get("precision") or line.get("gemm_quant_mode") or "").strip().lower()
    if precision and precision not in _DTYPES:
        raise UsageError(f"precision {precision!r} is none of {', '.join(_DTYPES)}")
    version = (line.get("backend_version") or "").strip()
    sides = _sides(line)
    weight_dtype = _weights(_DTYPES[precision] if precision else None, name)
    return MeasuredRow(
        id=line.get("id") or f"line {number}",
        model_name=name,
        hardware_name=chip,
        engine=engine,
        version=version,
        weight_dtype=weight_dtype,
        kv_dtype=(line.get("kv_precision") or "").strip().lower() or default_kv(engine, name, chip, weight_dtype),
        mtp_tokens=_drafted(line, engine, name, version, sides),
        sides=sides,
        concurrency=_positive(line, "concurrency"),
        prompt_tokens=_positive(line, "isl"),
        output_tokens=_positive(line, "osl"),
        ttft_s=_seconds(line, "silicon_ttft_ms"),
        tpot_s=_seconds(line, "silicon_tpot_ms"),
        as_default=_launched(line),
    )


def _model_name(path: str) -> str:
    """The catalogue's name; what a hub's says of the number format is left out."""
    name = path.strip().rsplit("/", 1)[-1].lower()
    tried = [name]
    for suffix in _SUFFIXES:
        name = name.removesuffix(suffix)
    tried.append(name)
    for one in tried:
        try:
            return model(one).name
        except UsageError as error:
            found = error
    raise found


def _weights(dtype: str | None, name: str) -> str | None:
    """gpt-oss is published in four bits of its own, which tables call fp4, and engines that compute it in eight call fp8."""
    return None if dtype is None or model(name).weight_dtype == "mxfp4" else dtype


def default_kv(engine: str, name: str, chip: str, weight_dtype: str | None) -> str:
    """What keeps KV in eight bits: TensorRT-LLM, wherever weights are quantised; the others on Blackwell."""
    quantised = weight_dtype not in (None, "bf16") or model(name).weight_dtype != "bf16"
    return "fp8" if quantised and (engine == "trtllm" or hardware(chip).family == "blackwell") else "bf16"


def _launched(line: Mapping[str, str]) -> bool:
    said = (line.get("launch") or "").strip().lower()
    if said not in ("", "default"):
        raise UsageError(f"launch {said!r} is not default: leave it empty where `pdlab.cost.launches` knows the server")
    return said == "default"


def _drafted(line: Mapping[str, str], engine: str, name: str, version: str, sides: tuple[Side, ...]) -> int:
    """What the table says; else by this module's head."""
    said = _number(line, "mtp_tokens")
    if said is not None:
        return max(0, round(said))
    if engine != "trtllm" or name != "deepseek-r1" or len(sides) > 1 or version not in _DRAFTING:
        return 0
    return 1 if sides[0].parallel.dp_attention > 1 else 3


def _sides(line: Mapping[str, str]) -> tuple[Side, ...]:
    if (line.get("mode") or "agg").strip() != "disagg":
        return (Side("mixed", 1, _parallel(line, "", alone=True)),)
    sides = []
    for role in ("prefill", "decode"):
        workers = _number(line, f"{role}_num_workers")
        if workers is None or workers < 1:
            raise UsageError(f"{role}_num_workers is missing: how many servers there were is not known")
        sides.append(Side(role, round(workers), _parallel(line, f"{role}_", alone=False)))
    return _as_launched(line, sides[0], sides[1])


def _as_launched(line: Mapping[str, str], prefill: Side, decode: Side) -> tuple[Side, ...]:
    """As its recipe says, where the table says otherwise."""
    if _launched(line):
        return prefill, decode
    engine, version, chip = (
        line["backend"].strip().lower(),
        (line.get("backend_version") or "").strip(),
        hardware(line["system"].strip()).name,
    )
    if engine == "sglang" and version.startswith("0.5.5") and chip == "gb200-nvl72":
        small = {side.role for side in (prefill, decode) if side.parallel.gpus == 4}
        if "prefill" in small and ("decode" in small or _positive(line, "isl") > 1024):
            prefill, decode = (replace(side, parallel=Parallel(tp=4)) if side.role in small else side for side in (prefill, decode))
    if engine == "sglang" and chip == "b200-sxm":
        wide = (side.parallel.dp_attention > 1 for side in (prefill, decode))
        prefill, decode = (
            replace(side, parallel=replace(side.parallel, ep=1)) if gathers else side
            for side, gathers in zip((prefill, decode), wide, strict=True)
        )
    if engine == "trtllm" and version.startswith("0.8.1") and chip == "b200-sxm" and (line.get("precision") or "").strip().lower() == "fp8":
        prefill = replace(prefill, parallel=replace(prefill.parallel, ep=1))
    return prefill, decode


def _parallel(line: Mapping[str, str], before: str, alone: bool) -> Parallel:
    """As the columns mean it: this module's head."""
    tp, dp, pp, moe_tp, moe_ep = (
        max(1, round(_number(line, f"{before}{key}") or 1))
        for key in ("tp_size", "attention_dp_size", "pp_size", "moe_tp_size", "moe_ep_size")
    )
    gpus = tp * dp
    if alone and moe_tp == moe_ep > 1 and gpus == moe_tp * moe_ep and _number(line, f"{before}attention_dp_size") is not None:
        gpus = moe_ep
        dp = gpus if tp == 1 else 1
        return Parallel(tp=gpus, dp_attention=dp, ep=moe_ep, pp=pp)
    if dp > 1 and moe_tp == gpus > 1 and line["backend"].strip().lower() == "sglang":
        moe_ep = gpus  # its data-parallel attention goes with expert parallelism
    if gpus == 1 and dp == 1 and moe_tp * moe_ep > 1:  # experts say how many there are, attention is whole on each
        gpus = dp = moe_tp * moe_ep
    return Parallel(tp=gpus, dp_attention=dp, ep=moe_ep if moe_ep > 1 and gpus % moe_ep == 0 else 1, pp=pp)


def _number(line: Mapping[str, str], key: str) -> float | None:
    text = (line.get(key) or "").strip()
    try:
        return float(text) if text else None
    except ValueError:
        raise UsageError(f"{key} {text!r} is not a number") from None


def _positive(line: Mapping[str, str], key: str) -> int:
    value = _number(line, key)
    if value is None or not 1 <= value < 1e9:
        raise UsageError(f"{key} is missing" if value is None else f"{key} {value:g} must be at least 1")
    return round(value)


def _seconds(line: Mapping[str, str], key: str) -> float:
    value = _number(line, key)
    if value is None or not 0 < value < 1e9:
        raise UsageError(f"{key} is missing" if value is None else f"{key} {value:g} must be positive")
    return value / 1e3
