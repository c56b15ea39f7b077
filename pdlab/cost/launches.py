"""How measured servers were launched and loaded, where their rows do not say it.

Most rows of aiconfigurator's table are SemiAnalysis's InferenceX: prompts and outputs of 1,024 / 1,024, 1,024 / 8,192 and 8,192 / 1,024
tokens. Its launch scripts are public (SemiAnalysisAI/InferenceX, benchmarks/), and hold prompts back on purpose:

    SGLang on Blackwell          looks for new requests at every 10th step, and from 16 requests on at every 30th
    TensorRT-LLM, Llama-3.1-70B  1,024 / 1,024 below tp 8: until a prompt has waited 20 steps or they fill 0.9 of max_num_tokens
    TensorRT-LLM, DeepSeek       fp8 on Blackwell, 1,024 / 1,024, 64 to 255 requests: 40 steps, or 0.8
    TensorRT-LLM                 attention data parallelism: until every rank has a prompt, or 60 steps are over (50 for gpt-oss)

SGLang's GLM and its Hopper servers do not. TensorRT-LLM's scripts of gpt-oss and Llama-3.1-70B ask for `num_postprocess_workers`, processes
that answer clients; its others do not. First tokens come sooner from them: what its front end takes is multiplied by `WITH_WORKERS`. Its
disaggregated servers answer through a proxy and two servers, which takes `APART` times as long; so did version 1.1, `IN_1_1` times. These
figures are fitted.

TensorRT-LLM's disaggregated recipes say how many requests a decoding server takes at once (`max_batch_size`, of each rank where
attention is data parallel), which is often less than its share of the concurrency: the rest wait for one to end, a part of what a decode
takes. `launches.csv` has them, of those that draft nothing (SemiAnalysisAI/InferenceX@0004cf5, .github/configs/nvidia-master.yaml, by the
names of recipes). A row is told by its accelerators, format, lengths, servers and concurrency.

SGLang's disaggregated recipes (NVIDIA/srt-slurm, recipes/) ask decoding servers to answer at every 10th step on GB200, at every 50th where
attention is data parallel, and at every 30th on B200 (`stream-interval`). Measured first tokens are late by half of that, whatever the
concurrency: a new request is taken to wait for the next such step. That is inferred.

SGLang's rows of other lengths are taken to be a single wave, all of whose requests arrive at once: their TTFT is half of what the wave's
prompts take. That is inferred, not said.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from importlib import resources

from pdlab.cost.measurements import SHORTEST_SHARE, MeasuredRow
from pdlab.cost.parallel import fitting

WAVES = 10  # requests of a run, in units of its concurrency
MAX_BATCH_TOKENS = 8192
INFERENCEX = ((1024, 1024), (1024, 8192), (8192, 1024))
WITH_WORKERS, APART, IN_1_1 = 0.35, 3.0, 2.5
_WORKERS = ("gpt-oss-120b", "llama-3.1-70b")
_DRAFT_ACCEPTANCE = 0.65


@dataclass(frozen=True, slots=True)
class Delay:
    """As `pdlab.batching.delayed` has it. In steps that make one token a sequence, as they are simulated."""

    steps: int
    tokens: int = 0
    polled: bool = False

    def waited_steps(self, prompts_a_step: float, prompt_tokens: float) -> float:
        """In the mean, by prompts that come at random, so many a step."""
        steps = float(self.steps)
        if self.tokens and prompts_a_step > 0.0:
            steps = min(steps, max(1.0, self.tokens / prompt_tokens) / prompts_a_step)
        if self.polled:
            return steps / 2
        others = prompts_a_step * steps  # that come while the first one waits
        return (steps + others * steps / 2) / (1.0 + others)


def waves(row: MeasuredRow) -> int:
    if row.as_default:
        return WAVES
    return 1 if row.engine == "sglang" and not row.disaggregated and _lengths(row) not in INFERENCEX else WAVES


def front_share(row: MeasuredRow) -> float:
    """Of what its engine's front end takes before a first token, what this one does."""
    if row.engine != "trtllm" or row.as_default:
        return 1.0
    if row.disaggregated:
        return APART
    if row.version.startswith("1.1."):
        return IN_1_1
    return WITH_WORKERS if _lengths(row) in INFERENCEX and row.model_name in _WORKERS else 1.0


def decode_slots(row: MeasuredRow) -> int | None:
    """Requests that each decoding server takes at once; None where nothing is said, and as many as come."""
    if row.as_default or row.engine != "trtllm" or not row.disaggregated or not row.model_name.startswith("deepseek"):
        return None
    prefill, decode = row.sides
    servers = (prefill.workers, decode.workers, decode.parallel.gpus)
    return _recipes().get((row.hardware_name, row.weight_dtype or "", *_lengths(row), *servers, row.concurrency))


@cache
def _recipes() -> dict[tuple[str | int, ...], int]:
    text = resources.files("pdlab.cost").joinpath("launches.csv").read_text(encoding="utf-8")
    whole = ("prompt", "output", "prefillers", "decoders", "decoder_gpus")
    return {
        (line["hardware"], line["weights"], *(int(line[key]) for key in whole), int(concurrency)): int(line["slots"])
        for line in csv.DictReader(text.splitlines())
        for concurrency in line["concurrency"].split()
    }


def delay(row: MeasuredRow) -> Delay | None:
    """What holds its prompts back, where anything does; of a disaggregated row, what has been prefilled."""
    if row.as_default or _lengths(row) not in INFERENCEX:
        return None
    if row.disaggregated:
        return _apart(row)
    blackwell = row.hardware().family == "blackwell"
    if row.engine == "sglang":
        return Delay(30 if row.concurrency >= 16 else 10, polled=True) if blackwell and not row.model_name.startswith("glm") else None
    return _of_tensorrt_llm(row, blackwell) if row.engine == "trtllm" else None


def _apart(row: MeasuredRow) -> Delay | None:
    if row.engine != "sglang" or row.hardware().family != "blackwell":
        return None
    if row.hardware_name.startswith("b"):
        return Delay(30, polled=True)
    return Delay(50 if row.sides[-1].parallel.dp_attention > 1 else 10, polled=True)


def _of_tensorrt_llm(row: MeasuredRow, blackwell: bool) -> Delay | None:
    groups = fitting(row.model(), row.sides[0].parallel).dp_attention
    deepseek = row.model_name.startswith("deepseek")
    if groups > 1:
        steps = 60 if deepseek else 50
        # a prompt goes to the rank whose sequence has just ended, which is chance: after so many each rank has one
        prompts = groups * sum(1.0 / k for k in range(1, groups + 1))
        return Delay(_made(row, steps), round(prompts * _mean(row.prompt_tokens)), polled=True)
    if _lengths(row) != (1024, 1024):
        return None
    if row.model_name == "llama-3.1-70b" and row.gpus < 8:
        return Delay(20, round(0.9 * (row.prompt_tokens + row.output_tokens)) - row.concurrency)
    if deepseek and blackwell and row.weight_dtype == "fp8" and not row.mtp_tokens and 64 <= row.concurrency < 256:
        return Delay(40, round(0.8 * MAX_BATCH_TOKENS) - row.concurrency)
    return None


def _made(row: MeasuredRow, steps: int) -> int:
    """Steps that make several tokens, in steps that make one."""
    return round(steps * sum(_DRAFT_ACCEPTANCE**k for k in range(row.mtp_tokens + 1)))


def _lengths(row: MeasuredRow) -> tuple[int, int]:
    return row.prompt_tokens, row.output_tokens


def _mean(nominal: int) -> float:
    return nominal * (1 + SHORTEST_SHARE) / 2
