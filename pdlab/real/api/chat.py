"""/v1/chat/completions: what is asked, and the shape of its answers."""

from __future__ import annotations

import dataclasses
import uuid
from typing import Any

import msgspec

from pdlab.real.api.errors import bad
from pdlab.real.api.generate import Choice, Delta, Logprob
from pdlab.real.api.legs import Prefill, check_leg, check_origin, leg_of
from pdlab.real.api.requests import MOST_LOGPROBS, Common, ask, choices, parse
from pdlab.real.api.service import Job, Service
from pdlab.real.api.structured import check_size, structured_field
from pdlab.real.api.tools import call_of, calls_of, tools_of
from pdlab.real.engine.tokenizer import Tokenizer
from pdlab.types import UsageError


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    def plain(self) -> dict[str, Any]:
        """As a chat template wants it: text parts joined. Raises ApiError on parts that are no text."""
        found = {key: value for key, value in msgspec.structs.asdict(self).items() if value is not None}
        found.setdefault("content", "")
        if isinstance(self.content, list):
            found["content"] = "\n".join(_text(part) for part in self.content)
        return found


def _text(part: dict[str, Any]) -> str:
    text = part.get("text")
    if part.get("type") != "text" or not isinstance(text, str):
        raise bad(f"message content of type {part.get('type')!r} is not supported, only text", "messages")
    return text


class ChatRequest(Common, frozen=True, kw_only=True):
    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


DECODER = msgspec.json.Decoder(ChatRequest)


class Chats:
    """The shape of the answers. `named_by_id`: tokens with log-probabilities are called token_id:ID, not by their text."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"
    before, after = b',"delta":{"content":', b'},"logprobs":null,"finish_reason":null'

    def __init__(self, tokenizer: Tokenizer, logprobs: int | None, named_by_id: bool) -> None:
        self.tokenizer, self.logprobs, self.named_by_id = tokenizer, logprobs, named_by_id

    def opening(self, choices: int) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        return [{"index": i, "delta": delta, "logprobs": None, "finish_reason": None} for i in range(choices)]

    def chunk(self, delta: Delta) -> dict[str, Any]:
        content: dict[str, Any] = {"content": delta.text} if delta.text or not (delta.finish or delta.calls) else {}
        if delta.calls:
            content["tool_calls"] = [call_of(piece, _call_id()) for piece in delta.calls]
        return {"index": delta.choice, "delta": content, "logprobs": self._logprobs(delta.logprobs), "finish_reason": delta.finish}

    def whole(self, index: int, choice: Choice) -> dict[str, Any]:
        text = "".join(choice.text)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if choice.calls:
            message |= {"content": text or None, "tool_calls": calls_of(choice.calls, _call_id)}
        return {"index": index, "message": message, "logprobs": self._logprobs(choice.logprobs), "finish_reason": choice.shown_finish}

    def _logprobs(self, found: list[Logprob]) -> dict[str, Any] | None:
        if self.logprobs is None:
            return None
        content = [{**self._token(one.token, one.logprob), "top_logprobs": [self._token(t, lp) for t, lp in one.top]} for one in found]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = f"token_id:{token}" if self.named_by_id else self.tokenizer.piece(token)
        return {"token": text, "logprob": logprob, "bytes": list(self.tokenizer.piece_bytes(token))}


def _call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


async def chat_job(service: Service, raw: bytes, of_the_cluster: bool = True) -> Job:
    """Raises ApiError naming what is wrong. Only what is `of_the_cluster` may have kv_transfer_params."""
    body = parse(raw, DECODER)
    check_origin(body.kv_transfer_params, of_the_cluster)
    service.check_model(body.model)
    n, best_of = choices(body, None)
    logprobs = _wanted(body)
    forced, tools = tools_of(body, service.tokenizer, service.tool_parser)
    if forced is not None and (field := structured_field(body)):
        raise bad(f"{field} does not go with tool_choice, which says itself what the output must be", field)
    if tools is not None and body.detokenize is False:
        raise bad("tools need text: leave detokenize out, or give tool_choice none", "tools")
    options = {**(body.chat_template_kwargs or {})}
    if body.continue_final_message:
        options["continue_final"] = True
    elif body.add_generation_prompt is not None:
        options["add_generation_prompt"] = body.add_generation_prompt
    if body.tools and body.tool_choice != "none":
        options["tools"] = body.tools
    prompt = await chat_tokens(service, body.messages, options)
    param = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    given = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    leg = leg_of(body.kv_transfer_params, service.engine.ready, service.exchange is not None)
    await service.check_peers(leg)
    if given is None and isinstance(leg, Prefill):
        given = 1
    if given is not None and given < 1:
        raise bad(f"{param} must be at least 1, not {given}", param)
    max_tokens = service.room(len(prompt), given, param, "messages")
    asked = ask(body, max_tokens=max_tokens, best_of=best_of, logprobs=logprobs, vocab=service.engine.ready.vocab, continues=False)
    asked = dataclasses.replace(asked, tools=tools)
    if forced is not None:
        check_size(forced, "tools")
        asked = dataclasses.replace(asked, sampling=msgspec.structs.replace(asked.sampling, structured=forced))
    await service.vet(asked.sampling.structured, structured_field(body) or "tools")
    if leg is not None:
        check_leg(leg, asked, bool(body.stream), 1)
    shape = Chats(service.tokenizer, logprobs, bool(body.return_tokens_as_token_ids))
    usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    return Job(shape, [prompt], asked, n, bool(body.stream), usage, leg)


async def chat_tokens(service: Service, messages: list[Message], options: dict[str, Any]) -> list[int]:
    """The messages through the model's template. What this refuses is told with its own words."""
    if not messages:
        raise bad("messages is empty", "messages")
    try:
        text = service.tokenizer.chat([message.plain() for message in messages], **options)
    except (UsageError, TypeError) as error:
        raise bad(" ".join(str(error).split()), "messages") from None
    tokens = await service.tokens_of(text, special=False, param="messages")
    if not tokens:
        raise bad("messages give an empty prompt", "messages")
    return tokens


def _wanted(body: ChatRequest) -> int | None:
    if body.top_logprobs is not None and not body.logprobs:
        raise bad("top_logprobs needs logprobs: true", "top_logprobs")
    if not 0 <= (body.top_logprobs or 0) <= MOST_LOGPROBS:
        raise bad(f"top_logprobs must be from 0 to {MOST_LOGPROBS}, not {body.top_logprobs}", "top_logprobs")
    return (body.top_logprobs or 0) if body.logprobs else None
