"""The bodies clients send, typed, and what they ask of the engine. Unknown fields are ignored, as vLLM does; wrong ones are named."""

from __future__ import annotations

import math
import re
from typing import Any, TypeVar

import msgspec

from pdlab.real.engine.messages import Sampling
from pdlab.real.openai.errors import bad

MOST_STOPS, MOST_CHOICES, MOST_LOGPROBS, MOST_BIASES = 16, 128, 20, 1024


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool = False


class Common(msgspec.Struct, frozen=True, kw_only=True):
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
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: int | None = None
    user: str | None = None


class CompletionRequest(Common, frozen=True, kw_only=True):
    prompt: str | list[Any]
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None


class Message(msgspec.Struct, frozen=True, kw_only=True):
    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None

    def plain(self) -> dict[str, Any]:
        """As a chat template wants it: text parts joined. Raises ApiError on parts that are no text."""
        found = {key: value for key, value in msgspec.structs.asdict(self).items() if value is not None}
        if isinstance(self.content, list):
            texts = []
            for part in self.content:
                if part.get("type") != "text" or not isinstance(part.get("text"), str):
                    raise bad(f"message content of type {part.get('type')!r} is not supported, only text", "messages")
                texts.append(part["text"])
            found["content"] = "\n".join(texts)
        elif self.content is None:
            found["content"] = ""
        return found


class ChatRequest(Common, frozen=True, kw_only=True):
    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class TokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool = True
    model: str | None = None


class DetokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    tokens: list[int]
    model: str | None = None


Body = TypeVar("Body", bound=msgspec.Struct)


def parse(raw: bytes, kind: type[Body]) -> Body:
    """A body. Raises ApiError naming the field that is missing or of the wrong type."""
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.ValidationError as error:
        text = str(error)
        what, _, place = text.partition(" - at `")
        if missing := re.search(r"missing required field `(\w+)`", what):
            raise bad(f"{missing[1]} is required", missing[1]) from None
        path = place.rstrip("`").removeprefix("$.").removeprefix("$")
        param = re.split(r"[.\[]", path)[0] or None
        raise bad(f"{path or 'the body'}: {what[:1].lower()}{what[1:]}", param) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise bad(f"the body is not valid JSON: {error}") from None


def stops(given: str | list[str] | None) -> tuple[str, ...]:
    found = (given,) if isinstance(given, str) else tuple(given or ())
    if len(found) > MOST_STOPS:
        raise bad(f"stop has {len(found)} strings, at most {MOST_STOPS} are allowed", "stop")
    if not all(found):
        raise bad("stop has an empty string, which would end every answer at once", "stop")
    return found


def sampling(body: Common, *, max_tokens: int, best_of: int, logprobs: int | None, vocab: int) -> Sampling:
    """What the engine is to do. Raises ApiError naming the parameter that is out of range."""

    def number(name: str, default: float, least: float, most: float, *, above: bool = False) -> float:
        value: float | None = getattr(body, name)
        if value is None:
            return default
        if not math.isfinite(value) or not least <= value <= most or (above and value == least):
            raise bad(
                f"{name} must be {'above' if above else 'from'} {least:g} {'and at most' if above else 'to'} {most:g}, not {value:g}", name
            )
        return float(value)

    if max_tokens < 1:
        raise bad(f"max_tokens must be at least 1, not {max_tokens}", "max_tokens")
    min_tokens = body.min_tokens or 0
    if not 0 <= min_tokens <= max_tokens:
        raise bad(f"min_tokens must be from 0 to max_tokens {max_tokens}, not {min_tokens}", "min_tokens")
    top_k = body.top_k or 0
    if top_k < -1:
        raise bad(f"top_k must be -1 or 0 (all), or at least 1, not {top_k}", "top_k")
    for token in body.stop_token_ids or ():
        if not 0 <= token < vocab:
            raise bad(f"stop_token_ids has {token}, which is not in the vocabulary of {vocab}", "stop_token_ids")
    if body.seed is not None and not -(2**63) <= body.seed < 2**63:
        raise bad(f"seed must fit into 64 bits, not {body.seed}", "seed")
    if abs(body.priority or 0) >= 2**31:
        raise bad(f"priority must fit into 32 bits, not {body.priority}", "priority")
    return Sampling(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        ignore_eos=bool(body.ignore_eos),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        temperature=number("temperature", 1.0, 0.0, 2.0),
        top_p=number("top_p", 1.0, 0.0, 1.0, above=True),
        top_k=max(top_k, 0),
        min_p=number("min_p", 0.0, 0.0, 1.0),
        presence_penalty=number("presence_penalty", 0.0, -2.0, 2.0),
        frequency_penalty=number("frequency_penalty", 0.0, -2.0, 2.0),
        repetition_penalty=number("repetition_penalty", 1.0, 0.0, 10.0, above=True),
        logit_bias=_biases(body.logit_bias, vocab),
        seed=body.seed,
        logprobs=logprobs,
        best_of=best_of,
    )


def _biases(given: dict[str, float] | None, vocab: int) -> dict[int, float]:
    found: dict[int, float] = {}
    if given and len(given) > MOST_BIASES:
        raise bad(f"logit_bias has {len(given)} tokens, at most {MOST_BIASES} are allowed", "logit_bias")
    for key, value in (given or {}).items():
        token = int(key) if re.fullmatch(r"\d{1,9}", key) else -1
        if not 0 <= token < vocab:
            raise bad(f"logit_bias has {key!r}, which is no token of the vocabulary of {vocab}", "logit_bias")
        if not -100 <= value <= 100:
            raise bad(f"logit_bias of token {key} must be from -100 to 100, not {value:g}", "logit_bias")
        found[token] = value
    return found


def choices(body: Common, best_of: int | None) -> tuple[int, int]:
    """(n, best_of). Rules: n <= best_of; a stream cannot wait to see which candidates are the best."""
    n = 1 if body.n is None else body.n
    most = n if best_of is None else best_of
    if not 1 <= n <= MOST_CHOICES:
        raise bad(f"n must be from 1 to {MOST_CHOICES}, not {n}", "n")
    if not 1 <= most <= MOST_CHOICES:
        raise bad(f"best_of must be from 1 to {MOST_CHOICES}, not {most}", "best_of")
    if n > most:
        raise bad(f"n {n} must not exceed best_of {most}", "n")
    if body.stream and most > n:
        raise bad(f"best_of {most} above n {n} cannot be streamed: leave stream out", "best_of")
    return n, most


def prompts(given: str | list[Any]) -> list[str | list[int]]:
    """One prompt or several, text or token ids."""
    if isinstance(given, str):
        return [given]
    if not given:
        raise bad("prompt is empty", "prompt")
    if all(isinstance(part, str) for part in given):
        return list(given)
    if _ids(given):
        return [list(given)]
    if all(isinstance(part, list) and part and _ids(part) for part in given):
        return list(given)
    raise bad("prompt must be a string, a list of strings, a list of token ids, or a list of such lists", "prompt")


def _ids(given: list[Any]) -> bool:
    return all(isinstance(part, int) and not isinstance(part, bool) for part in given)
