"""What clients send, typed, and what it asks of the engine. Values out of range are named."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import msgspec

from pdlab.real.api.errors import bad
from pdlab.real.api.refused import RefusedFields
from pdlab.real.api.structured import StructuredAsk, structured_of
from pdlab.real.api.tools import ToolUse
from pdlab.real.engine.messages import Sampling
from pdlab.real.models.tokenizer import Tokenizer
from pdlab.real.net.wire import Carrier, KvParams

MOST_LABEL = 256  # characters
MOST_WAIT_MS = 1e9  # before a request was asked here
MOST_STOPS, MOST_CHOICES, MOST_LOGPROBS, MOST_BIASES = 16, 128, 20, 1024
MOST_BAD_WORDS, MOST_BAD_CHARACTERS = 128, 256  # words, and characters of one


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Common(RefusedFields, frozen=True, kw_only=True):
    """What both endpoints take. None: not given."""

    model: str | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    n: int | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    prompt_logprobs: int | None = None
    truncate_prompt_tokens: int | None = None
    add_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: int | None = None
    user: str | None = None
    session_id: str | None = None
    service_tier: object = None
    kv_transfer_params: KvParams | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    detokenize: bool | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: StructuredAsk | None = None
    guided_json: str | dict[str, Any] | bool | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None
    ttft_slo_ms: float | None = None
    tpot_slo_ms: float | None = None
    waited_ms: float | None = None

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def wants_usage_always(self) -> bool:
        return self.wants_usage and self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)


@dataclass(frozen=True, slots=True)
class Ask:
    """What is to be done with each prompt: `sampling` by the engine, the rest here. `continues`: the text follows a prompt's.
    `token_ids`: they are told; unless `text`, nothing else is. `tools`: calls of them are read from the text. `only_prompt`: what the
    engine makes, one token, is not told."""

    sampling: Sampling
    stops: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special: bool = True
    continues: bool = False
    priority: int = 0
    token_ids: bool = False
    text: bool = True
    ttft_slo_s: float | None = None
    tpot_slo_s: float | None = None
    only_prompt: bool = False
    tools: ToolUse | None = None
    waited_s: float = 0.0  # before it was asked here
    session: str = ""
    tenant: str = ""
    offline: bool = False
    trace: Carrier | None = None  # of a request that is traced: what is above what is done for it


def ask(
    body: Common,
    tokenizer: Tokenizer,
    *,
    max_tokens: int,
    best_of: int,
    logprobs: int | None,
    prompt_logprobs: int | None,
    vocab: int,
    continues: bool,
) -> Ask:
    """`max_tokens` 0: the prompt alone is told. Raises ApiError naming the parameter that is out of range."""
    if body.stream_options is not None and not body.stream:
        raise bad("stream_options needs stream: true", "stream_options")
    if body.detokenize is False and body.stop:
        raise bad("stop needs text: leave detokenize out, or give stop_token_ids", "stop")
    sampling = Sampling(
        max_tokens=_whole("max_tokens", max_tokens or 1, 1, 2**31),
        min_tokens=_whole("min_tokens", body.min_tokens or 0, 0, max_tokens),
        ignore_eos=bool(body.ignore_eos),
        stop_token_ids=_stop_tokens(body.stop_token_ids or [], vocab),
        temperature=_number(body, "temperature", 1.0, 0.0, 2.0),
        top_p=_number(body, "top_p", 1.0, 0.0, 1.0, above=True),
        top_k=max(_whole("top_k", body.top_k or 0, -1, 2**31), 0),
        min_p=_number(body, "min_p", 0.0, 0.0, 1.0),
        presence_penalty=_number(body, "presence_penalty", 0.0, -2.0, 2.0),
        frequency_penalty=_number(body, "frequency_penalty", 0.0, -2.0, 2.0),
        repetition_penalty=_number(body, "repetition_penalty", 1.0, 0.0, 10.0, above=True),
        logit_bias=_biases(body.logit_bias or {}, vocab),
        allowed_token_ids=_allowed(body.allowed_token_ids, vocab),
        bad_words=_bad_words(body.bad_words or [], tokenizer),
        seed=None if body.seed is None else _whole("seed", body.seed, -(2**63), 2**63 - 1),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        best_of=best_of,
        structured=structured_of(body),
    )
    return Ask(
        sampling,
        _stops(body.stop),
        bool(body.include_stop_str_in_output),
        body.skip_special_tokens is not False,
        continues,
        _whole("priority", body.priority or 0, -(2**31), 2**31),
        bool(body.return_token_ids),
        body.detokenize is not False,
        _slo_s(body, "ttft_slo_ms"),
        _slo_s(body, "tpot_slo_ms"),
        not max_tokens,
        waited_s=_number(body, "waited_ms", 0.0, 0.0, MOST_WAIT_MS) / 1000,
        session=label("session_id", body.session_id or ""),
        tenant=label("user", body.user or ""),
        offline=body.service_tier == "flex",
    )


def choices(body: Common, best_of: int | None) -> tuple[int, int]:
    """(n, best_of). n <= best_of, and a stream cannot wait to see which candidates are the best."""
    n = _whole("n", 1 if body.n is None else body.n, 1, MOST_CHOICES)
    most = _whole("best_of", n if best_of is None else best_of, 1, MOST_CHOICES)
    if n > most:
        raise bad(f"n {n} must not exceed best_of {most}", "n")
    if body.stream and most > n:
        raise bad(f"best_of {most} above n {n} cannot be streamed: leave stream out", "best_of")
    return n, most


def check_tokens(tokens: list[int], vocab: int, param: str) -> None:
    wrong = next((token for token in tokens if not 0 <= token < vocab), None)
    if wrong is not None:
        raise bad(f"{param} has token {wrong}, which is not in the vocabulary of {vocab}", param)


def _whole(name: str, value: int, least: int, most: int) -> int:
    if value < least:
        raise bad(f"{name} must be at least {least}, not {value}", name)
    if value > most:
        raise bad(f"{name} must be at most {most}, not {value}", name)
    return value


def _number(body: Common, name: str, default: float, least: float, most: float, *, above: bool = False) -> float:
    value: float | None = getattr(body, name)
    if value is None:
        return default
    if not math.isfinite(value) or not least <= value <= most or (above and value == least):
        between = f"above {least:g} and at most {most:g}" if above else f"from {least:g} to {most:g}"
        raise bad(f"{name} must be {between}, not {value:g}", name)
    return float(value)


def label(name: str, value: str) -> str:
    """What says what a request belongs to."""
    if len(value) > MOST_LABEL:
        raise bad(f"{name} has {len(value)} characters, at most {MOST_LABEL} are taken", name)
    return value


def _slo_s(body: Common, name: str) -> float | None:
    value: float | None = getattr(body, name)
    if value is not None and not (math.isfinite(value) and value > 0):
        raise bad(f"{name} must be above 0, not {value:g}", name)
    return None if value is None else value / 1000


def _stops(given: str | list[str] | None) -> tuple[str, ...]:
    found = (given,) if isinstance(given, str) else tuple(given or ())
    if len(found) > MOST_STOPS:
        raise bad(f"stop has {len(found)} strings, at most {MOST_STOPS} are allowed", "stop")
    if not all(found):
        raise bad("stop has an empty string, which would end every answer at once", "stop")
    return found


def _stop_tokens(given: list[int], vocab: int) -> tuple[int, ...]:
    check_tokens(given, vocab, "stop_token_ids")
    return tuple(given)


def _biases(given: dict[str, float], vocab: int) -> dict[int, float]:
    if len(given) > MOST_BIASES:
        raise bad(f"logit_bias has {len(given)} tokens, at most {MOST_BIASES} are allowed", "logit_bias")
    found: dict[int, float] = {}
    for key, value in given.items():
        token = int(key) if re.fullmatch(r"[0-9]{1,9}", key) else -1
        if not 0 <= token < vocab:
            raise bad(f"logit_bias has {key!r}, which is no token of the vocabulary of {vocab}", "logit_bias")
        if not -100 <= value <= 100:
            raise bad(f"logit_bias of token {key} must be from -100 to 100, not {value:g}", "logit_bias")
        found[token] = value
    return found


def _allowed(given: list[int] | None, vocab: int) -> tuple[int, ...]:
    if given is None:
        return ()
    if not given:
        raise bad("allowed_token_ids is empty, which leaves nothing to answer with: leave it out", "allowed_token_ids")
    check_tokens(given, vocab, "allowed_token_ids")
    return tuple(sorted(set(given)))


def _bad_words(given: list[str], tokenizer: Tokenizer) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Each word as tokens, at the beginning of a text and after a space."""
    if len(given) > MOST_BAD_WORDS:
        raise bad(f"bad_words has {len(given)} words, at most {MOST_BAD_WORDS} are allowed", "bad_words")
    found: dict[str, tuple[tuple[int, ...], ...]] = {}
    for word in given:
        if not word.strip() or len(word) > MOST_BAD_CHARACTERS:
            raise bad(f"bad_words must have 1 to {MOST_BAD_CHARACTERS} characters that are no spaces each, not {word[:40]!r}", "bad_words")
        first, after = (tuple(tokenizer.encode(space + word.lstrip(), special=False)) for space in ("", " "))
        found[word] = (first,) if after[-len(first) :] == first else (first, after)
    return found
