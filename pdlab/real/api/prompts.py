"""What is asked of a prompt itself, and what an answer repeats of it: its text (`echo`), and the log-probabilities of its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pdlab.real.api.errors import bad
from pdlab.real.api.requests import MOST_LOGPROBS, Common
from pdlab.real.engine.messages import Scored
from pdlab.real.models.detokenize import Detokenizer
from pdlab.real.models.tokenizer import Tokenizer

MOST_SCORES = 1 << 17  # log-probabilities of prompts that one answer may have


def prompt_scores(body: Common, echoed: int | None = None) -> int | None:
    """How many alternatives to each prompt token's log-probability the engine is to tell; None: nothing of them. `echoed`: so many are
    shown in the prompt's echo."""
    wanted = body.prompt_logprobs
    if wanted is not None and not 0 <= wanted <= MOST_LOGPROBS:
        raise bad(f"prompt_logprobs must be from 0 to {MOST_LOGPROBS}, not {wanted}", "prompt_logprobs")
    return max((one for one in (wanted, echoed) if one is not None), default=None)


def check_scores(prompt_tokens: int, alternatives: int | None, param: str) -> None:
    """Raises ApiError where the log-probabilities of prompts would be too many for one answer."""
    if alternatives is not None and prompt_tokens * (alternatives + 1) > MOST_SCORES:
        raise bad(
            f"{param} of {prompt_tokens} prompt tokens, with {alternatives} alternatives each, are more than the {MOST_SCORES} that "
            "one answer may have: ask for fewer",
            param,
        )


def cut(tokens: list[int], body: Common, most: int) -> list[int]:
    """The prompt's last `truncate_prompt_tokens`; of -1, as many as fit (`most`)."""
    wanted = body.truncate_prompt_tokens
    if wanted is None:
        return tokens
    if wanted < -1 or wanted == 0:
        raise bad(f"truncate_prompt_tokens must be -1 or at least 1, not {wanted}", "truncate_prompt_tokens")
    return tokens[-(max(most, 1) if wanted == -1 else wanted) :]


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt to be repeated."""

    text: str
    tokens: list[int]

    @classmethod
    def of(cls, tokenizer: Tokenizer, prompt: str | list[int], tokens: list[int], *, whole: bool) -> Echo:
        """Of a `prompt` as it was sent, which is `tokens`; unless `whole`, these are its last ones."""
        return cls(prompt if whole and isinstance(prompt, str) else tokenizer.decode(tokens), tokens)

    def offsets(self, tokenizer: Tokenizer) -> list[int]:
        """Where each token's text begins, in characters. A special token that the text does not show, as one that begins every text, has
        none of it."""
        detokenizer = Detokenizer(tokenizer, skip_special=False)
        offsets, at = [], 0
        for token in self.tokens:
            offsets.append(min(at, len(self.text)))
            piece = detokenizer.push((token,))
            if token not in tokenizer.special_ids or self.text.startswith(piece, at):
                at += len(piece)
        return offsets


def told_scores(tokenizer: Tokenizer | None, tokens: Sequence[int], scores: Sequence[Scored], alternatives: int) -> list[Any]:
    """vLLM's `prompt_logprobs`: for each token of the prompt its own log-probability and those of the `alternatives` likeliest, by their
    ids; null for the first. Without a tokenizer the tokens' texts are left out."""
    found: list[Any] = [None]
    for token, one in zip(tokens[1:], scores, strict=True):
        ranked = {token: (one.logprob, one.rank)}
        for rank, (other, logprob) in enumerate(one.top[:alternatives], 1):
            ranked.setdefault(other, (logprob, rank))
        found.append(
            {
                str(id): {"logprob": logprob, "rank": rank, "decoded_token": None if tokenizer is None else tokenizer.piece(id)}
                for id, (logprob, rank) in ranked.items()
            }
        )
    return found
