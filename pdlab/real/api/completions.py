"""/v1/completions: what is asked, and the shape of its answers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec

from pdlab.real.api.errors import bad
from pdlab.real.api.generate import Choice, Delta, Logprob
from pdlab.real.api.legs import Prefill, check_leg, check_origin, leg_of
from pdlab.real.api.requests import MOST_LOGPROBS, Common, ask, check_tokens, choices, parse
from pdlab.real.api.service import Job, Service
from pdlab.real.api.structured import structured_field
from pdlab.real.engine.tokenizer import Tokenizer


class CompletionRequest(Common, frozen=True, kw_only=True):
    prompt: str | list[Any]
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None


DECODER = msgspec.json.Decoder(CompletionRequest)


class Completions:
    """`echoes` are the prompts' texts where they are to be repeated before the output, else empty; each has `per_prompt` choices.
    `named_by_id`: tokens with log-probabilities are called token_id:ID, not by their text (vLLM's return_tokens_as_token_ids)."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"
    before, after = b',"text":', b',"logprobs":null,"finish_reason":null'

    def __init__(self, tokenizer: Tokenizer, logprobs: int | None, echoes: Sequence[str], per_prompt: int, named_by_id: bool) -> None:
        self.tokenizer, self.logprobs, self.echoes, self.per_prompt = tokenizer, logprobs, echoes, per_prompt
        self.named_by_id = named_by_id
        self.offsets: dict[int, int] = {}

    def opening(self, choices: int) -> list[dict[str, Any]]:
        """Chunks before the first token."""
        if not self.echoes:
            return []
        return [{"index": i, "text": self._echo(i), "logprobs": None, "finish_reason": None} for i in range(choices)]

    def chunk(self, delta: Delta) -> dict[str, Any]:
        logprobs = self._logprobs(delta.choice, delta.logprobs)
        return {"index": delta.choice, "text": delta.text, "logprobs": logprobs, "finish_reason": delta.finish}

    def whole(self, index: int, choice: Choice) -> dict[str, Any]:
        text = self._echo(choice.index) + "".join(choice.text)
        return {"index": index, "text": text, "logprobs": self._logprobs(choice.index, choice.logprobs), "finish_reason": choice.finish}

    def _echo(self, choice: int) -> str:
        return self.echoes[choice // self.per_prompt] if self.echoes else ""

    def _logprobs(self, choice: int, found: list[Logprob]) -> dict[str, Any] | None:
        if self.logprobs is None:
            return None
        pieces = [self._piece(one.token) for one in found]
        offset = self.offsets.get(choice, len(self._echo(choice)))
        offsets = []
        for piece in pieces:
            offsets.append(offset)
            offset += len(piece)
        self.offsets[choice] = offset
        top = [self._top(one) for one in found] if self.logprobs else None
        return {"tokens": pieces, "token_logprobs": [one.logprob for one in found], "top_logprobs": top, "text_offset": offsets}

    def _top(self, one: Logprob) -> dict[str, float]:
        """The alternatives, and the sampled token whether or not it is one of them, as OpenAI documents it."""
        found = {self._piece(token): logprob for token, logprob in one.top}
        found.setdefault(self._piece(one.token), one.logprob)
        return found

    def _piece(self, token: int) -> str:
        """A token's text, or its bytes where they are no whole characters: those texts would all look alike."""
        if self.named_by_id:
            return f"token_id:{token}"
        text = self.tokenizer.piece(token)
        return text if "\ufffd" not in text else "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.tokenizer.piece_bytes(token))


async def completion_job(service: Service, raw: bytes, of_the_cluster: bool = True) -> Job:
    """Raises ApiError naming what is wrong. Only what is `of_the_cluster` may have kv_transfer_params."""
    body = parse(raw, DECODER)
    check_origin(body.kv_transfer_params, of_the_cluster)
    service.check_model(body.model)
    n, best_of = choices(body, body.best_of)
    logprobs = body.logprobs
    if body.suffix:
        raise bad("suffix is not supported", "suffix")
    if logprobs is not None and not 0 <= logprobs <= MOST_LOGPROBS:
        raise bad(f"logprobs must be from 0 to {MOST_LOGPROBS}, not {logprobs}", "logprobs")
    if body.echo and logprobs is not None:
        raise bad("echo with logprobs is not supported: prompt tokens have no log-probabilities here", "echo")
    if body.echo and body.detokenize is False:
        raise bad("echo needs text: leave detokenize out", "echo")
    given = _prompts(body.prompt)
    service.check_prompts(len(given))
    for prompt in given:  # all of them, before one is tokenized, or its ids are looked at
        if isinstance(prompt, str):
            service.check_length(prompt)
        else:
            service.room(len(prompt), None, "max_tokens", "prompt")
    leg = leg_of(body.kv_transfer_params, service.engine.ready, service.exchange is not None)
    await service.check_peers(leg)
    max_tokens = (1 if isinstance(leg, Prefill) else 16) if body.max_tokens is None else body.max_tokens
    wanted = 0 if best_of > n and logprobs is None else logprobs
    asked = ask(body, max_tokens=max_tokens, best_of=best_of, logprobs=wanted, vocab=service.engine.ready.vocab, continues=True)
    await service.vet(asked.sampling.structured, structured_field(body))
    prompts = []
    for prompt in given:
        prompts.append(await _tokens(service, prompt))
        service.room(len(prompts[-1]), max_tokens, "max_tokens", "prompt")
    if leg is not None:
        check_leg(leg, asked, bool(body.stream), len(prompts))
    echoes = [p if isinstance(p, str) else service.tokenizer.decode(p) for p in given] if body.echo else []
    shape = Completions(service.tokenizer, logprobs, echoes, best_of, bool(body.return_tokens_as_token_ids))
    usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    return Job(shape, prompts, asked, n, bool(body.stream), usage, leg)


async def _tokens(service: Service, prompt: str | list[int]) -> list[int]:
    tokens = prompt if isinstance(prompt, list) else await service.tokens_of(prompt)
    if not tokens:
        raise bad("prompt is empty", "prompt")
    check_tokens(tokens, min(service.engine.ready.vocab, 2**31), "prompt")
    await asyncio.sleep(0)  # others' tokens go on between the prompts of a long list
    return tokens


def _prompts(given: str | list[Any]) -> list[str | list[int]]:
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
    raise bad("prompt must be a string, a list of strings, a list of token ids, or a list of such lists, none of them empty", "prompt")


def _ids(given: list[Any]) -> bool:
    return all(type(part) is int for part in given)
