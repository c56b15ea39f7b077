"""/v1/chat/completions: what is asked, and the shape of its answers."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Mapping
from typing import Any, ClassVar

import msgspec

from pdlab.core.types import UsageError
from pdlab.real.api.errors import bad
from pdlab.real.api.generate import Choice, Delta, Logprob
from pdlab.real.api.legs import Prefill, check_leg, check_origin, leg_of
from pdlab.real.api.parse import parse
from pdlab.real.api.prompts import check_scores, cut, prompt_scores, told_scores
from pdlab.real.api.refused import IN_CHATS, Refusals
from pdlab.real.api.requests import MOST_LOGPROBS, Common, ask, choices
from pdlab.real.api.service import GenerateJob, Service
from pdlab.real.api.structured import check_size, structured_field
from pdlab.real.api.tools import call_of, calls_of, tools_of
from pdlab.real.engine.messages import Scored
from pdlab.real.models.tokenizer import Tokenizer


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    thinking: str | None = None
    function_call: Any = None  # these two are refused
    audio: Any = None

    def plain(self, place: str) -> dict[str, Any]:
        """As a chat template wants it: text parts joined, the arguments of tool calls as the mappings they spell. `place` is where in the
        body it stands. Raises ApiError on parts that are no text, and arguments that are no JSON object."""
        for name, instead in (("function_call", "give tool_calls"), ("audio", "only text is taken")):
            if getattr(self, name) is not None:
                raise bad(f"{place}.{name} is not supported: {instead}", "messages")
        found = {key: value for key, value in msgspec.structs.asdict(self).items() if value is not None}
        found.setdefault("content", "")
        if isinstance(self.content, list):
            found["content"] = "\n".join(_text(part) for part in self.content)
        if self.tool_calls is not None:
            found["tool_calls"] = [_called(call, f"{place}.tool_calls[{at}]") for at, call in enumerate(self.tool_calls)]
        return found


def _called(call: dict[str, Any], place: str) -> dict[str, Any]:
    """OpenAI sends the arguments as JSON text; templates read a mapping, as vLLM gives it them."""
    function = call.get("function")
    if not isinstance(function, dict):
        raise bad(f"{place}.function is required", "messages")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = msgspec.json.decode(arguments)
        except (msgspec.DecodeError, UnicodeError, RecursionError):
            raise bad(f"{place}.function.arguments is not JSON: {arguments[:80]!r}", "messages") from None
    if not isinstance(arguments, dict):
        raise bad(f"{place}.function.arguments must be a JSON object, not {str(arguments)[:80]!r}", "messages")
    return {**call, "function": {**function, "arguments": arguments}}


def _text(part: dict[str, Any]) -> str:
    text = part.get("text")
    if part.get("type") != "text" or not isinstance(text, str):
        raise bad(f"message content of type {part.get('type')!r} is not supported, only text", "messages")
    return text


class ChatRequest(Common, frozen=True, kw_only=True):
    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    documents: list[dict[str, Any]] | None = None
    reasoning_effort: str | None = None

    refusals: ClassVar[Refusals] = IN_CHATS


DECODER = msgspec.json.Decoder(ChatRequest)


class Chats:
    """The shape of the answers. `named_by_id`: tokens with log-probabilities are called token_id:ID, not by their text. `prompt_logprobs`:
    how many alternatives each token of the `prompt` is told with; None: it is not told."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"
    before, after = b',"delta":{"content":', b'},"logprobs":null,"finish_reason":null'

    needs_scores = False

    def __init__(
        self, tokenizer: Tokenizer, logprobs: int | None, named_by_id: bool, prompt: list[int], prompt_logprobs: int | None = None
    ) -> None:
        self.tokenizer, self.logprobs, self.named_by_id = tokenizer, logprobs, named_by_id
        self.prompt, self.prompt_logprobs = prompt, prompt_logprobs

    def opening(self, choice: int, scores: list[Scored] | None) -> dict[str, Any]:
        return {"index": choice, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def chunk(self, delta: Delta) -> dict[str, Any]:
        content: dict[str, Any] = {"content": delta.text} if delta.text or not (delta.finish or delta.calls) else {}
        if delta.calls:
            content["tool_calls"] = [call_of(piece, _call_id()) for piece in delta.calls]
        return {"index": delta.choice, "delta": content, "logprobs": self._logprobs(delta.logprobs), "finish_reason": delta.finish}

    def whole(self, index: int, choice: Choice, scores: list[Scored] | None) -> dict[str, Any]:
        text = "".join(choice.text)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if choice.calls:
            message |= {"content": text or None, "tool_calls": calls_of(choice.calls, _call_id)}
        return {"index": index, "message": message, "logprobs": self._logprobs(choice.logprobs), "finish_reason": choice.shown_finish}

    def beside(self, scores: Mapping[int, list[Scored]]) -> dict[str, Any]:
        if self.prompt_logprobs is None or 0 not in scores:
            return {}
        return {"prompt_logprobs": told_scores(self.tokenizer, self.prompt, scores[0], self.prompt_logprobs)}

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


async def chat_job(service: Service, raw: bytes, of_the_cluster: bool = True) -> GenerateJob:
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
    options = template_options(body, service.tokenizer)
    prompt = await chat_tokens(
        service, body.messages, options, special=bool(body.add_special_tokens), cut=body.truncate_prompt_tokens is not None
    )
    param = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    given = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    leg = leg_of(body.kv_transfer_params, service.engine.ready, service.exchange is not None)
    await service.check_peers(leg)
    if given is None and isinstance(leg, Prefill):
        given = 1
    if given is not None and given < 1:
        raise bad(f"{param} must be at least 1, not {given}", param)
    prompt = cut(prompt, body, service.engine.ready.max_tokens - (given or 1))
    max_tokens = service.room(len(prompt), given, param, "messages")
    scores = prompt_scores(body)
    if scores is not None and body.stream:
        raise bad("prompt_logprobs of a chat cannot be streamed: leave stream out", "prompt_logprobs")
    check_scores(len(prompt), scores, "prompt_logprobs")
    asked = ask(
        body,
        service.tokenizer,
        max_tokens=max_tokens,
        best_of=best_of,
        logprobs=logprobs,
        prompt_logprobs=scores,
        vocab=service.engine.ready.vocab,
        continues=False,
    )
    asked = dataclasses.replace(asked, tools=tools)
    if forced is not None:
        check_size(forced, "tools")
        asked = dataclasses.replace(asked, sampling=msgspec.structs.replace(asked.sampling, structured=forced))
    if asked.sampling.structured is not None:
        await service.vet(asked.sampling.structured, structured_field(body) or "tools")
    if leg is not None:
        check_leg(leg, asked, bool(body.stream), 1)
    shape = Chats(service.tokenizer, logprobs, bool(body.return_tokens_as_token_ids), prompt, scores)
    return GenerateJob(shape, [prompt], asked, n, bool(body.stream), body.wants_usage, leg, body.wants_usage_always)


def template_options(body: ChatRequest, tokenizer: Tokenizer) -> dict[str, Any]:
    """What goes to the chat template beside the messages. Raises ApiError where it does not read what is given."""
    options = {**(body.chat_template_kwargs or {})}
    if body.continue_final_message and body.add_generation_prompt:
        raise bad("continue_final_message and add_generation_prompt exclude each other", "continue_final_message")
    if body.continue_final_message:
        options["continue_final"] = True
    elif body.add_generation_prompt is not None:
        options["add_generation_prompt"] = body.add_generation_prompt
    for name, value in (("documents", body.documents or None), ("reasoning_effort", body.reasoning_effort)):
        if value is None:
            continue
        if not tokenizer.templates.reads(name):
            raise bad(f"{name} is not supported by this model: its chat template does not read it", name)
        options[name] = value
    if body.tools and body.tool_choice != "none":
        options["tools"] = body.tools
    return options


async def chat_tokens(
    service: Service, messages: list[ChatMessage], options: dict[str, Any], special: bool = False, cut: bool = False
) -> list[int]:
    """The messages through the model's template. What this refuses is told with its own words."""
    if not messages:
        raise bad("messages is empty", "messages")
    try:
        plain = [message.plain(f"messages[{at}]") for at, message in enumerate(messages)]
        text = service.tokenizer.templates.chat(plain, **options)
    except (UsageError, TypeError) as error:
        raise bad(" ".join(str(error).split()), "messages") from None
    tokens = await service.tokens_of(text, special, "messages", cut)
    if not tokens:
        raise bad("messages give an empty prompt", "messages")
    return tokens


def _wanted(body: ChatRequest) -> int | None:
    if body.top_logprobs is not None and not body.logprobs:
        raise bad("top_logprobs needs logprobs: true", "top_logprobs")
    if not 0 <= (body.top_logprobs or 0) <= MOST_LOGPROBS:
        raise bad(f"top_logprobs must be from 0 to {MOST_LOGPROBS}, not {body.top_logprobs}", "top_logprobs")
    return (body.top_logprobs or 0) if body.logprobs else None
