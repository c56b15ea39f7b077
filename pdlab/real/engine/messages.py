"""What passes between the HTTP process and the engine process: msgpack by msgspec, never pickle.

The HTTP process tokenizes, hashes prefixes, turns tokens into text and matches stop strings; the engine schedules, computes, samples,
and knows token ids only. A request has `best_of` candidates, numbered from 0; every message about tokens names the candidate.
"""

from __future__ import annotations

import msgspec

from pdlab.core.types import Report


class StructuredOutputs(msgspec.Struct, frozen=True, omit_defaults=True):
    """What an output must be: vLLM's `structured_outputs`. One of the first six is set; `json` is a schema's text, `structural_tag` JSON
    with `structures` and `triggers`."""

    json: str | None = None
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None  # Lark, or GBNF
    json_object: bool = False
    structural_tag: str | None = None
    whitespace_pattern: str | None = None  # between the parts of JSON
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False


class Sampling(msgspec.Struct, frozen=True):
    """How tokens are drawn. Temperature 0 takes the likeliest. `logprobs` is the number of alternatives wanted beside each sampled
    token's own log-probability; None: no log-probabilities at all. Log-probabilities are those of the model's softmax before temperature
    and filters, as in vLLM. `prompt_logprobs`: the same of the prompt's tokens, which are
    then all computed, whatever the prefix cache holds."""

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
    allowed_token_ids: tuple[int, ...] = ()  # no other token is drawn; empty: all
    bad_words: dict[str, tuple[tuple[int, ...], ...]] = {}  # each word, and the tokens that spell it, which are not made in that order
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    best_of: int = 1
    structured: StructuredOutputs | None = None


class ToEngine(msgspec.Struct, frozen=True, tag=True):
    """Sent to the engine."""


class Vocabulary(ToEngine, frozen=True):
    """The bytes of each token, for structured outputs. `special_ids` are no text."""

    tokens: list[bytes]
    special_ids: list[int]
    eos_ids: tuple[int, ...]


class Compile(ToEngine, frozen=True):
    """Have the grammar ready for requests that follow; the Vocabulary has come before. Answered by `Compiled`, under `call`."""

    call: int
    structured: StructuredOutputs


class Push(msgspec.Struct, frozen=True):
    """Where to write a prompt's KV: `blocks` that a peer expects under `ticket`, the first `cached_tokens` of which are there. By "request"
    (when the prompt is computed), "chunk" (each when it is), or "layer" (while it is)."""

    descriptor: bytes
    ticket: str
    blocks: list[int]
    cached_tokens: int = 0
    granularity: str = "request"
    deadline_s: float = 30.0


class Source(msgspec.Struct, frozen=True):
    """KV to read: of a sequence's first `kv_tokens` tokens, in a peer's `blocks`, leased as `lease`. No descriptor: nobody has any,
    and it is computed here."""

    descriptor: bytes
    lease: str
    blocks: list[int]
    kv_tokens: int


class Submit(ToEngine, frozen=True):
    """`hashes` is the chain of the prompt's full blocks (`pdlab.core.prefix.chain`). Unless it `decodes_here`, its KV is leased after the
    first token (a `Held`, then finish "held"), for whoever decodes it, or written to where `push` says. `sent_s`, on this machine's
    monotonic clock, is when it began to wait; without it, when the engine looked, which is between two steps. `waited_s` is how long its
    client had waited by then. `trace` is for a router, which passes it on."""

    id: int
    tokens: list[int]
    sampling: Sampling = Sampling()
    hashes: tuple[int, ...] = ()
    priority: int = 0
    decodes_here: bool = True
    push: Push | None = None
    ttft_slo_s: float | None = None
    tpot_slo_s: float | None = None
    sent_s: float | None = None
    waited_s: float = 0.0
    session: str = ""
    tenant: str = ""
    offline: bool = False
    trace: tuple[str, str] | None = None


class Receive(ToEngine, frozen=True):
    """A request whose KV comes from elsewhere: take blocks for its prompt and the tokens `made` (but the last of these, whose KV its next
    step computes), answer `Reserved` or `Full`, and read them from `source`; without one they are pushed. It decodes when all has come
    and `last` was said, here or in a `Proceed`; before it does, `Landed` is told. After `deadline_s` at most it ends with an error.
    `prefix`: the source has the beginning of its prompt, and the rest is computed here; all, where nothing comes or no blocks are free."""

    submit: Submit
    made: list[int] = []
    source: Source | None = None
    last: bool = True
    deadline_s: float = 30.0
    prefix: bool = False


class Proceed(ToEngine, frozen=True):
    """More for a `Receive` that was not the last: what is `made` by now, in all, and where its KV is. The blocks read before are not read
    again. Each one but the last is answered by `Staged`, once its KV is here, or by `Full`."""

    id: int
    made: list[int] = []
    source: Source | None = None
    last: bool = True


class Resume(ToEngine, frozen=True):
    """What is leased here as `lease` is decoded here after all, as `submit` (another id); `made` is what exists of its output. An error
    where the lease has ended."""

    submit: Submit
    lease: str
    made: list[int] = []


class Release(ToEngine, frozen=True):
    """A lease is not needed any more. Harmless when it has ended."""

    lease: str


class RenewLease(ToEngine, frozen=True):
    lease: str
    lease_s: float = 30.0


class AskLease(ToEngine, frozen=True):
    """Does a lease still hold? Answered by `Holds`, under `call`."""

    call: int
    lease: str


class Export(ToEngine, frozen=True):
    """Lease the KV of a running request, for a migration; with `stop` it stands still from then on (finish "moved" when it was read, or it
    goes on when the lease ends otherwise), with `resume` it goes on. Answered by `Exported`, under `call`."""

    call: int
    id: int
    stop: bool = False
    resume: bool = False
    lease_s: float = 30.0


class Lend(ToEngine, frozen=True):
    """Lease what the prefix cache has of these blocks, from the first on. Answered by `Exported`, under `call`; without a lease where it
    has none."""

    call: int
    hashes: tuple[int, ...]
    lease_s: float = 30.0


class Cancel(ToEngine, frozen=True):
    """Stop a request, or one of its candidates (-1: all). Harmless when it has ended."""

    id: int
    candidate: int = -1


class StopEngine(ToEngine, frozen=True):
    """End the process; whatever still runs is dropped."""


class FromEngine(msgspec.Struct, frozen=True, tag=True):
    """Sent by the engine."""


class Loading(FromEngine, frozen=True):
    """What the engine does before it is ready, for whoever waits."""

    stage: str


class Ready(FromEngine, frozen=True):
    """The model is loaded and the KV memory taken. `max_tokens` bounds prompt plus output of one sequence: the model's `context_tokens` (0:
    not told), and KV memory without the blocks that no single request gets. The profiles, as in an InstanceSpec, are what the engine has
    measured of itself."""

    model: str
    max_tokens: int
    vocab: int
    block_tokens: int
    kv_blocks: int
    device: str
    dtype: str
    kv_dtype: str = ""  # of the KV cache; empty: as `dtype`
    load_s: float = 0.0
    block_bytes: int = 0
    descriptor: bytes = b""  # of the KV memory, for peers; empty: this engine does not exchange KV
    engine_id: str = ""
    context_tokens: int = 0
    drafts: int = 0  # tokens at most that it drafts for a sequence in a step
    tp: int = 1  # ranks of the instance
    prefill_profile: tuple[tuple[int, float], ...] = ()
    decode_profile: tuple[tuple[int, int, float], ...] = ()


class Scored(msgspec.Struct, frozen=True, array_like=True):
    """A prompt token's log-probability after those before it, its rank among all (1: the likeliest), and the likeliest alternatives."""

    logprob: float
    rank: int
    top: list[tuple[int, float]]


class Tokens(FromEngine, frozen=True):
    """New tokens of one candidate. `start` is the index of the first of them, so that a gap or a repeat shows. `finish` ends the
    candidate: "stop" (end of sequence, or a stop token, which is the last of `tokens`), "length", "held" (prefilled for
    another to decode), "moved" (migrated away), "abort" (cancelled), "error".
    `cached_tokens` of the prompt came from the prefix cache; `queue_s` is the wait until its computation began. `prompt`: of the prompt's
    tokens but the first, once, with the first token that comes after it."""

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
    prompt: list[Scored] | None = None


class Held(msgspec.Struct, frozen=True, tag=True):
    """A prompt's KV is leased as `lease`: of its first `kv_tokens` tokens, in `blocks`. Comes just before the finish "held"."""

    id: int
    lease: str
    blocks: list[int]
    kv_tokens: int


class Reserved(msgspec.Struct, frozen=True, tag=True):
    """The answer to a Receive: blocks are taken, the first `cached_tokens` of them hold what they shall. A peer may push under `ticket`."""

    id: int
    ticket: str
    blocks: list[int]
    cached_tokens: int


class Full(msgspec.Struct, frozen=True, tag=True):
    """There is no room for a Receive or Proceed now. The request is forgotten."""

    id: int
    reason: str


class Staged(msgspec.Struct, frozen=True, tag=True):
    """The KV of a Receive or Proceed that was not the last is here."""

    id: int


class Landed(msgspec.Struct, frozen=True, tag=True):
    """All KV is here; the request decodes from now on, after the `made` tokens it was given. Its bytes took `seconds`, and were all here
    `waited_s` ago: what comes is looked at between two steps."""

    id: int
    bytes: int
    seconds: float
    transport: str
    made: int
    waited_s: float = 0.0
    prefix_tokens: int = 0  # of a prefix that was read, and is computed no more


class Missed(msgspec.Struct, frozen=True, tag=True):
    """The KV of a Receive or Proceed does not come; the outputs that follow say it in words. `cause`: "expired" (the lease or ticket was
    over), "deadline", "incomplete" (some was not there), "failed" (the connection, or what the peer did)."""

    id: int
    cause: str


class Exported(FromEngine, frozen=True):
    """The answer to an Export. `error`: it does not run here (any more); else as in `Held`, and the tokens `made`."""

    call: int
    error: str = ""
    lease: str = ""
    blocks: list[int] = []
    kv_tokens: int = 0
    made: list[int] = []


class Compiled(FromEngine, frozen=True):
    """The answer to a Compile: "" or, in one line, why there is no such grammar."""

    call: int
    reason: str


class Holds(FromEngine, frozen=True):
    """The answer to an Ask. False: the lease has ended, or never was."""

    call: int
    holds: bool


News = Held | Reserved | Full | Staged | Landed | Missed  # of a request's KV
NO_LOAD = Report("")  # a Report of nobody, until its reader puts the name in


class Step(FromEngine, frozen=True):
    """All the news of one engine step, and the load after it, as a Report means it, with the prefix cache's changes and the steps since the
    last Step. Times are the engine's monotonic clock, seconds; counters are since start."""

    outputs: list[Tokens]
    report: Report = NO_LOAD
    leaked_blocks: int = 0  # referenced though nothing is here; 0 unless there is a bug
    prompt_tokens: int = 0  # computed
    prefix_queries: int = 0  # prompt tokens looked up in the prefix cache
    prefix_hits: int = 0  # and found
    news: list[News] = []  # told before the outputs
    leases: int = 0  # held for peers
    idle: bool = True  # nothing is here: `Worker.idle`
    transfer_bytes: int = 0  # received, since start
    failed_transfers: int = 0
    expired_leases: int = 0  # of prompts that nobody read, since start
    log_dropped: int = 0  # lines of its own log that a full disk did not take, since start
    drafts: int = 0  # verified, of some tokens each, since start
    drafted_tokens: int = 0
    accepted_tokens: list[int] = []  # of those, by position in their draft


class EngineBroken(FromEngine, frozen=True):
    """The engine cannot start (`usage`: the user's mistake, one clear line), or a step failed and the engine has ended."""

    reason: str
    usage: bool = False


AnyToEngine = (
    Submit | Vocabulary | Compile | Receive | Proceed | Resume | Release | RenewLease | AskLease | Export | Lend | Cancel | StopEngine
)
AnyFromEngine = Loading | Ready | Step | Exported | Holds | Compiled | EngineBroken
FromQueue = Tokens | Held | Reserved | Full | Staged | Landed | Missed  # what a request's queue brings

TO_ENGINE: msgspec.msgpack.Decoder[AnyToEngine] = msgspec.msgpack.Decoder(AnyToEngine)
FROM_ENGINE: msgspec.msgpack.Decoder[AnyFromEngine] = msgspec.msgpack.Decoder(AnyFromEngine)
