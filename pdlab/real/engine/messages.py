"""What passes between the HTTP process and the engine process: msgpack by msgspec, never pickle.

The HTTP process tokenizes, hashes prefixes, turns tokens into text and matches stop strings; the engine schedules, computes, samples,
and knows token ids only. A request has `best_of` candidates, numbered from 0; every message about tokens names the candidate.
"""

from __future__ import annotations

import msgspec


class Sampling(msgspec.Struct, frozen=True):
    """How tokens are drawn. Temperature 0 takes the likeliest. `logprobs` is the number of alternatives wanted beside each sampled
    token's own log-probability; None: no log-probabilities at all. Log-probabilities are those of the model's softmax before temperature
    and filters, as in vLLM."""

    max_tokens: int = 16
    min_tokens: int = 0  # no end-of-sequence or stop token before that many
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    presence_penalty: float = 0.0  # over the output, as OpenAI defines it
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    logprobs: int | None = None
    best_of: int = 1


class ToEngine(msgspec.Struct, frozen=True, tag=True):
    """Sent to the engine."""


class Submit(ToEngine, frozen=True):
    """`hashes` is the chain of the prompt's full blocks (`pdlab.prefix.chain`). Unless it `stays`, its KV is held after the first token
    (finish "held"), for whoever decodes it."""

    id: int
    tokens: list[int]
    sampling: Sampling = Sampling()
    hashes: tuple[int, ...] = ()
    priority: int = 0
    stays: bool = True


class Cancel(ToEngine, frozen=True):
    """Stop a request, or one of its candidates (-1: all). Harmless when it has ended."""

    id: int
    candidate: int = -1


class Stop(ToEngine, frozen=True):
    """End the process; whatever still runs is dropped."""


class FromEngine(msgspec.Struct, frozen=True, tag=True):
    """Sent by the engine."""


class Ready(FromEngine, frozen=True):
    """The model is loaded and the KV memory taken. `max_tokens` bounds prompt plus output of one sequence (context and KV memory)."""

    model: str
    max_tokens: int
    vocab: int
    block_tokens: int
    kv_blocks: int
    device: str
    dtype: str
    load_s: float = 0.0


class Tokens(FromEngine, frozen=True):
    """New tokens of one candidate. `start` is the index of the first of them, so that a gap or a repeat shows. `finish` ends the
    candidate: "stop" (end of sequence, or a stop token, which is the last of `tokens`), "length", "held" (prefilled for
    another to decode), "abort" (cancelled), "error".
    `cached_tokens` of the prompt came from the prefix cache; `queue_s` is the wait until its computation began."""

    id: int
    candidate: int
    start: int
    tokens: list[int]
    finish: str | None = None
    logprobs: list[float] | None = None
    top: list[list[tuple[int, float]]] | None = None  # per token: (token, logprob), likeliest first
    cached_tokens: int = 0
    queue_s: float = 0.0
    error: str = ""


class Step(FromEngine, frozen=True):
    """All the news of one engine step, and the load after it. Times are the engine's monotonic clock, seconds; `waiting` and `running`
    count sequences, `used_blocks` those referenced by some; counters are since start."""

    outputs: list[Tokens]
    at_s: float = 0.0
    waiting: int = 0
    running: int = 0
    used_blocks: int = 0
    leaked_blocks: int = 0  # referenced though nothing is here; 0 unless there is a bug
    preemptions: int = 0
    prompt_tokens: int = 0  # computed
    prefix_queries: int = 0  # prompt tokens looked up in the prefix cache
    prefix_hits: int = 0  # and found


class Broken(FromEngine, frozen=True):
    """The engine cannot start (`usage`: the user's mistake, one clear line), or a step failed and the engine has ended."""

    reason: str
    usage: bool = False


AnyToEngine = Submit | Cancel | Stop
AnyFromEngine = Ready | Step | Broken
