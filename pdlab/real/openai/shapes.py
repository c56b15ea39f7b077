"""The JSON that clients get: choices, chunks, log-probabilities, usage, in OpenAI's shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from pdlab.real.engine.tokenizer import Tokenizer
from pdlab.real.openai.generate import Choice, Delta, Generation, Logprob

encode = msgspec.json.Encoder().encode
DONE = b"data: [DONE]\n\n"


def event(body: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + encode(body) + b"\n\n"


def usage(generation: Generation) -> dict[str, Any]:
    prompt, completion = generation.prompt_tokens, generation.completion_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": generation.cached_tokens},
    }


class Completions:
    """/v1/completions. `echoes` are the prompts' texts where they are to be repeated before the output, else empty."""

    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl"

    def __init__(self, tokenizer: Tokenizer, logprobs: int | None, echoes: Sequence[str], per_prompt: int) -> None:
        self.tokenizer, self.logprobs, self.echoes, self.per_prompt = tokenizer, logprobs, echoes, per_prompt
        self.offsets: dict[int, int] = {}

    def opening(self, choices: int) -> list[dict[str, Any]]:
        """Chunks before the first token."""
        if not self.echoes:
            return []
        return [{"index": i, "text": self.echoes[i // self.per_prompt], "logprobs": None, "finish_reason": None} for i in range(choices)]

    def chunk(self, delta: Delta) -> dict[str, Any]:
        return {
            "index": delta.choice,
            "text": delta.text,
            "logprobs": self._logprobs(delta.choice, delta.logprobs),
            "finish_reason": delta.finish,
        }

    def whole(self, index: int, choice: Choice) -> dict[str, Any]:
        echo = self.echoes[choice.index // self.per_prompt] if self.echoes else ""
        return {
            "index": index,
            "text": echo + "".join(choice.text),
            "logprobs": self._logprobs(choice.index, choice.logprobs),
            "finish_reason": choice.finish,
        }

    def _logprobs(self, choice: int, found: list[Logprob]) -> dict[str, Any] | None:
        if self.logprobs is None:
            return None
        pieces = [self._piece(one.token) for one in found]
        offset = self.offsets.get(choice, 0)
        offsets = []
        for piece in pieces:
            offsets.append(offset)
            offset += len(piece)
        self.offsets[choice] = offset
        top = [{self._piece(token): logprob for token, logprob in one.top} for one in found] if self.logprobs else None
        return {"tokens": pieces, "token_logprobs": [one.logprob for one in found], "top_logprobs": top, "text_offset": offsets}

    def _piece(self, token: int) -> str:
        """A token's text, or its bytes where they are no whole characters: those texts would all look alike."""
        text = self.tokenizer.piece(token)
        return text if "\ufffd" not in text else "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.tokenizer.piece_bytes(token))


class Chats:
    """/v1/chat/completions."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, tokenizer: Tokenizer, logprobs: int | None) -> None:
        self.tokenizer, self.logprobs = tokenizer, logprobs

    def opening(self, choices: int) -> list[dict[str, Any]]:
        return [
            {"index": i, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None} for i in range(choices)
        ]

    def chunk(self, delta: Delta) -> dict[str, Any]:
        content = {"content": delta.text} if delta.text or not delta.finish else {}
        return {"index": delta.choice, "delta": content, "logprobs": self._logprobs(delta.logprobs), "finish_reason": delta.finish}

    def whole(self, index: int, choice: Choice) -> dict[str, Any]:
        message = {"role": "assistant", "content": "".join(choice.text), "refusal": None}
        return {"index": index, "message": message, "logprobs": self._logprobs(choice.logprobs), "finish_reason": choice.finish}

    def _logprobs(self, found: list[Logprob]) -> dict[str, Any] | None:
        if self.logprobs is None:
            return None
        return {
            "content": [
                {**self._token(one.token, one.logprob), "top_logprobs": [self._token(t, lp) for t, lp in one.top]} for one in found
            ],
            "refusal": None,
        }

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        return {"token": self.tokenizer.piece(token), "logprob": logprob, "bytes": list(self.tokenizer.piece_bytes(token))}
