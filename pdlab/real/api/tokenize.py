"""/tokenize and /detokenize: texts and chats to tokens, as a request for them would be, and back."""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec

from pdlab.real.api.chat import ChatMessage, ChatRequest, chat_tokens, template_options
from pdlab.real.api.errors import bad
from pdlab.real.api.parse import parse
from pdlab.real.api.refused import ANYWHERE, Refusals, RefusedFields
from pdlab.real.api.requests import check_tokens
from pdlab.real.api.service import Service


class TokenizeRequest(RefusedFields, frozen=True, kw_only=True):
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = None
    model: str | None = None
    return_token_strs: bool | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    refusals: ClassVar[Refusals] = Refusals({name: ANYWHERE[name] for name in ("chat_template", "mm_processor_kwargs")})


class DetokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    tokens: list[int]
    model: str | None = None


TOKENIZE, DETOKENIZE = msgspec.json.Decoder(TokenizeRequest), msgspec.json.Decoder(DetokenizeRequest)


async def tokenized(service: Service, raw: bytes) -> dict[str, Any]:
    """Raises ApiError naming what is wrong."""
    body = parse(raw, TOKENIZE)
    service.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise bad("give either prompt or messages", "prompt")
    if body.prompt is None:
        chat = ChatRequest(
            messages=body.messages or [],
            tools=body.tools,
            chat_template_kwargs=body.chat_template_kwargs,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
        )
        options = template_options(chat, service.tokenizer)
        tokens = await chat_tokens(service, chat.messages, options, special=bool(body.add_special_tokens))
    else:
        tokens = await service.tokens_of(body.prompt, body.add_special_tokens is not False)
    found: dict[str, Any] = {"count": len(tokens), "max_model_len": service.engine.ready.max_tokens, "tokens": tokens}
    if body.return_token_strs:
        found["token_strs"] = [service.tokenizer.backend.id_to_token(token) for token in tokens]
    return found


def detokenized(service: Service, raw: bytes) -> dict[str, Any]:
    """Raises ApiError naming what is wrong."""
    body = parse(raw, DETOKENIZE)
    service.check_model(body.model)
    if (count := len(body.tokens)) > service.engine.ready.max_tokens:
        raise bad(
            f"tokens has {count} tokens, more than the {service.engine.ready.max_tokens} that fit", "tokens", "context_length_exceeded"
        )
    check_tokens(body.tokens, service.engine.ready.vocab, "tokens")
    return {"prompt": service.tokenizer.decode(body.tokens, skip_special=False)}
