"""/v1/completions: what is asked, and the shape of its answers."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import msgspec

from pdlab.real.api.errors import bad
from pdlab.real.api.generate import Choice, Delta, Logprob
from pdlab.real.api.legs import Prefill, check_leg, check_origin, leg_of
from pdlab.real.api.parse import parse
from pdlab.real.api.prompts import Echo, check_scores, cut, prompt_scores, told_scores
from pdlab.real.api.refused import IN_COMPLETIONS, Refusals
from pdlab.real.api.requests import MOST_LOGPROBS, Common, ask, check_tokens, choices
from pdlab.real.api.service import GenerateJob, Service
from pdlab.real.api.structured import structured_field
from pdlab.real.engine.messages import Scored
from pdlab.real.models.detokenize import Detokenizer
from pdlab.real.models.tokenizer import Tokenizer


class CompletionRequest(Common, frozen=True, kw_only=True):
    prompt: str | list[Any]
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None

    refusals: ClassVar[Refusals] = IN_COMPLETIONS


DECODER = msgspec.json.Decoder(CompletionRequest)


class Completions:
    """The shape of the answers. `echoes` are the prompts where they are to be repeated before the output, else empty; each has `per_prompt`
    choices. `prompt_logprobs`: how many alternatives each prompt token's log-probability is told with, beside the choice's text; None: it
    is not told. `named_by_id`: tokens with log-probabilities are called token_id:ID, not by their text (vLLM's
    return_tokens_as_token_ids); unless `texts`, prompt tokens are told by their ids alone."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"
    before, after = b',"text":', b',"logprobs":null,"finish_reason":null'

    def __init__(
        self,
        tokenizer: Tokenizer,
        logprobs: int | None,
        echoes: Sequence[Echo],
        per_prompt: int,
        named_by_id: bool,
        *,
        prompts: Sequence[list[int]] = (),
        prompt_logprobs: int | None = None,
        skip_special: bool = True,
        texts: bool = True,
    ) -> None:
        self.tokenizer, self.logprobs, self.echoes, self.per_prompt = tokenizer, logprobs, echoes, per_prompt
        self.prompts, self.prompt_logprobs = prompts, prompt_logprobs
        self.named_by_id, self.skip_special, self.texts = named_by_id, skip_special, texts
        self.offsets: dict[
            int, tuple[int, Detokenizer]
        ] = {}  # of each choice: where its next token's text begins, and what tells its length

    @property
    def needs_scores(self) -> bool:
        """Are its openings known only when the prompts are computed?"""
        return self.prompt_logprobs is not None or (bool(self.echoes) and self.logprobs is not None)

    def opening(self, choice: int, scores: list[Scored] | None) -> dict[str, Any] | None:
        """The chunk before the choice's first token."""
        if not self.echoes and self.prompt_logprobs is None:
            return None
        logprobs = self._logprobs(choice, [], scores)
        chunk = {"index": choice, "text": self._echo(choice), "logprobs": logprobs, "finish_reason": None}
        return {**chunk, **self._of_prompt(choice, scores)}

    def chunk(self, delta: Delta) -> dict[str, Any]:
        logprobs = self._logprobs(delta.choice, delta.logprobs)
        return {"index": delta.choice, "text": delta.text, "logprobs": logprobs, "finish_reason": delta.finish}

    def whole(self, index: int, choice: Choice, scores: list[Scored] | None) -> dict[str, Any]:
        text = self._echo(choice.index) + "".join(choice.text)
        logprobs = self._logprobs(choice.index, choice.logprobs, scores)
        shown = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": choice.finish}
        return {**shown, **self._of_prompt(choice.index, scores)}

    def beside(self, scores: Mapping[int, list[Scored]]) -> dict[str, Any]:
        """What stands beside the choices of a whole answer; `scores` by prompt."""
        return {}

    def _echo(self, choice: int) -> str:
        return self.echoes[choice // self.per_prompt].text if self.echoes else ""

    def _of_prompt(self, choice: int, scores: list[Scored] | None) -> dict[str, Any]:
        if self.prompt_logprobs is None or scores is None:
            return {}
        tokenizer = self.tokenizer if self.texts else None
        return {"prompt_logprobs": told_scores(tokenizer, self.prompts[choice // self.per_prompt], scores, self.prompt_logprobs)}

    def _logprobs(self, choice: int, found: list[Logprob], scores: list[Scored] | None = None) -> dict[str, Any] | None:
        """Of the echo too, where the prompt's scores are given."""
        if self.logprobs is None:
            return None
        tokens, logprobs, tops, offsets = self._echoed(choice, scores) if self.echoes and scores is not None else ([], [], [], [])
        at, text = self.offsets.get(choice) or (
            len(self._echo(choice)),
            Detokenizer(self.tokenizer, self.skip_special, continues=True),
        )
        for one in found:
            offsets.append(at)
            at += len(text.push((one.token,)))
        self.offsets[choice] = at, text
        tokens += [self._piece(one.token) for one in found]
        logprobs += [one.logprob for one in found]
        tops += [self._top(one.token, one.logprob, one.top) for one in found] if self.logprobs else []
        return {
            "tokens": tokens,
            "token_logprobs": logprobs,
            "top_logprobs": tops if self.logprobs else None,
            "text_offset": offsets,
        }

    def _echoed(self, choice: int, scores: list[Scored]) -> tuple[list[str], list[float | None], list[dict[str, float] | None], list[int]]:
        """The prompt's tokens, their log-probabilities (none of the first), alternatives, and offsets."""
        echo, most = self.echoes[choice // self.per_prompt], self.logprobs or 0
        tops: list[dict[str, float] | None] = [None]
        for token, one in zip(echo.tokens[1:], scores, strict=True):
            tops.append(self._top(token, one.logprob, one.top[:most]))
        return [self._piece(token) for token in echo.tokens], [None, *(one.logprob for one in scores)], tops, echo.offsets(self.tokenizer)

    def _top(self, token: int, logprob: float, top: list[tuple[int, float]]) -> dict[str, float]:
        """The alternatives, and the token itself whether or not it is one of them, as OpenAI documents it."""
        found = {self._piece(one): logprob_of for one, logprob_of in top}
        found.setdefault(self._piece(token), logprob)
        return found

    def _piece(self, token: int) -> str:
        """A token's text, or its bytes where they are no whole characters: those texts would all look alike."""
        if self.named_by_id:
            return f"token_id:{token}"
        text = self.tokenizer.piece(token)
        return text if "\ufffd" not in text else "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.tokenizer.piece_bytes(token))


async def completion_job(service: Service, raw: bytes, of_the_cluster: bool = True) -> GenerateJob:
    """Raises ApiError naming what is wrong. Only what is `of_the_cluster` may have kv_transfer_params."""
    body = parse(raw, DECODER)
    check_origin(body.kv_transfer_params, of_the_cluster)
    service.check_model(body.model)
    n, best_of = choices(body, body.best_of)
    logprobs = body.logprobs
    if logprobs is not None and not 0 <= logprobs <= MOST_LOGPROBS:
        raise bad(f"logprobs must be from 0 to {MOST_LOGPROBS}, not {logprobs}", "logprobs")
    if body.echo and body.detokenize is False:
        raise bad("echo needs text: leave detokenize out", "echo")
    given = _prompts(body.prompt)
    service.check_prompts(len(given))
    for prompt in given:  # all of them, before one is tokenized, or its ids are looked at
        if isinstance(prompt, str):
            service.check_length(prompt)
        elif body.truncate_prompt_tokens is None:
            service.room(len(prompt), None, "max_tokens", "prompt")
    leg = leg_of(body.kv_transfer_params, service.engine.ready, service.exchange is not None)
    await service.check_peers(leg)
    scores = prompt_scores(body, logprobs if body.echo else None)
    max_tokens = _max_tokens(body, isinstance(leg, Prefill), bool(body.echo) or scores is not None)
    wanted = 0 if best_of > n and logprobs is None else logprobs
    vocab, most = service.engine.ready.vocab, service.engine.ready.max_tokens
    asked = ask(
        body,
        service.tokenizer,
        max_tokens=max_tokens,
        best_of=best_of,
        logprobs=wanted,
        prompt_logprobs=scores,
        vocab=vocab,
        continues=True,
    )
    if asked.sampling.structured is not None:
        await service.vet(asked.sampling.structured, structured_field(body))
    prompts = []
    for prompt in given:
        tokens = await _tokens(service, prompt, body.add_special_tokens is not False, body.truncate_prompt_tokens is not None)
        prompts.append(cut(tokens, body, most - asked.sampling.max_tokens))
        service.room(len(prompts[-1]), None if body.max_tokens is None else asked.sampling.max_tokens, "max_tokens", "prompt")
    check_scores(sum(map(len, prompts)), scores, "prompt_logprobs" if body.prompt_logprobs is not None else "logprobs")
    if leg is not None:
        check_leg(leg, asked, bool(body.stream), len(prompts))
    echoes: list[Echo] = []
    if body.echo:
        uncut = body.truncate_prompt_tokens is None
        echoes = [Echo.of(service.tokenizer, prompt, tokens, whole=uncut) for prompt, tokens in zip(given, prompts, strict=True)]
    shape = Completions(
        service.tokenizer,
        logprobs,
        echoes,
        best_of,
        bool(body.return_tokens_as_token_ids),
        prompts=prompts,
        prompt_logprobs=body.prompt_logprobs,
        skip_special=asked.skip_special,
        texts=asked.text,
    )
    return GenerateJob(shape, prompts, asked, n, bool(body.stream), body.wants_usage, leg, body.wants_usage_always)


def _max_tokens(body: CompletionRequest, prefills: bool, shows_prompt: bool) -> int:
    """OpenAI's default is 16; 0 asks for the prompt alone, where it is shown."""
    if body.max_tokens is None:
        return 1 if prefills else 16
    if body.max_tokens < 1 and not (body.max_tokens == 0 and shows_prompt):
        raise bad(f"max_tokens must be at least 1, not {body.max_tokens}", "max_tokens")
    return body.max_tokens


async def _tokens(service: Service, prompt: str | list[int], special: bool, cut: bool) -> list[int]:
    tokens = prompt if isinstance(prompt, list) else await service.tokens_of(prompt, special, cut=cut)
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
    if (ids := _ids(given)) is not None:
        return [ids]
    lists = [_ids(part) if isinstance(part, list) and part else None for part in given]
    if not any(part is None for part in lists):
        return [part for part in lists if part is not None]
    raise bad("prompt must be a string, a list of strings, a list of token ids, or a list of such lists, none of them empty", "prompt")


def _ids(given: list[Any]) -> list[int] | None:
    """Token ids, where they are such; 3.0 is one."""
    if all(type(part) is int for part in given):
        return given
    if all(type(part) is int or (type(part) is float and part.is_integer()) for part in given):
        return [int(part) for part in given]
    return None
