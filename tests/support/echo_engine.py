"""A stand-in for the engine, deterministic and without a model, and a real tokenizer whose tokens are single bytes."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from pdlab.core.types import Report
from pdlab.real.engine.messages import FromQueue, Ready, Sampling, Scored, Step, Submit, Tokens

EOS, START, END = 256, 257, 258
VOCAB, CONTEXT, BLOCK = 300, 512, 4
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role not in ['system', 'user', 'assistant', 'tool'] %}{{ raise_exception('no role ' + m.role) }}{% endif %}"
    "<start>{{ m.role }}\n{{ m.content }}<end>{% endfor %}{% if tools %}tools:{{ tools | length }}{% endif %}"
    "{% if add_generation_prompt %}<start>assistant\n{% endif %}"
)


def byte_tokenizer(folder: Path, template: str | None = TEMPLATE) -> Path:
    """Writes the files of a tokenizer: ids 0 to 255 are bytes, then <eos>, <start>, <end>."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spelled = {byte: chr(byte) for byte in printable}
    spelled |= {byte: chr(256 + at) for at, byte in enumerate(b for b in range(256) if b not in printable)}
    backend = Backend(models.BPE(vocab={spelled[byte]: byte for byte in range(256)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, special=True) for name in ("<eos>", "<start>", "<end>")])
    backend.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<eos>"} | ({"chat_template": template} if template else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


class Sequence:
    def __init__(self, submit: Submit, candidate: int, arriving: asyncio.Queue[FromQueue]) -> None:
        self.submit, self.candidate, self.arriving = submit, candidate, arriving
        self.made = self.given = 0

    @property
    def key(self) -> tuple[int, int]:
        return self.submit.id, self.candidate


class EchoEngine:
    """Candidate c of a prompt says it again from its c-th token on, round and round; <eos> ends it, a bias of 100 makes it say that token.
    Each step gives every running sequence `per_step` tokens. At most `seqs` run; candidate c's tokens have log-probability
    -(1 + 3 c mod 5) / 10, the prompt's i-th -i / 10 and rank i. It stands still while
    `paused`; so does a sequence that has made `holds_at` tokens, till that is another."""

    def __init__(self, *, step_s: float = 0.0, per_step: int = 1, seqs: int = 10_000, context: int = CONTEXT) -> None:
        self.ready = Ready("stand-in", context, VOCAB, BLOCK, 10_000, "cpu", "float32", drafts=2)
        self.load = Step([])
        self.down: str | None = None
        self.step_s, self.per_step, self.seqs = step_s, per_step, seqs
        self.submitted: list[Submit] = []
        self.cancelled: list[tuple[int, int]] = []
        self.live: dict[tuple[int, int], Sequence] = {}
        self.seen: set[int] = set()
        self.computed = self.queries = self.hits = 0
        self.paused = False
        self.holds_at = 0
        self._task: asyncio.Task[None] | None = None

    def submit(self, submit: Submit, arriving: asyncio.Queue[FromQueue] | None = None) -> asyncio.Queue[FromQueue]:
        queue: asyncio.Queue[FromQueue] = asyncio.Queue() if arriving is None else arriving
        for candidate in range(submit.sampling.best_of):
            if self.down is not None:
                queue.put_nowait(Tokens(submit.id, candidate, 0, [], "error", error=self.down))
            else:
                self.live[submit.id, candidate] = Sequence(submit, candidate, queue)
        self.submitted.append(submit)
        self.wake()
        return queue

    @property
    def leases(self) -> int:
        return 0

    def wake(self) -> None:
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run())

    def cancel(self, id: int, candidate: int = -1) -> None:
        self.cancelled.append((id, candidate))
        for key in [key for key in self.live if key[0] == id and candidate in (-1, key[1])]:
            gone = self.live.pop(key)
            gone.arriving.put_nowait(Tokens(*gone.key, gone.made, [], "abort"))

    def die(self, reason: str) -> None:
        self.down = reason
        for gone in self.live.values():
            gone.arriving.put_nowait(Tokens(*gone.key, gone.made, [], "error", error=reason))
        self.live.clear()

    async def _run(self) -> None:
        while self.live:
            if not self.paused:
                for sequence in list(self.live.values())[: self.seqs]:
                    if not self.holds_at or sequence.made != self.holds_at:
                        self._advance(sequence)
            self._tell()
            await asyncio.sleep(self.step_s)
        self._tell()

    def _tell(self) -> None:
        running = min(len(self.live), self.seqs)
        self.load = Step(
            [],
            Report("", running=running, waiting=len(self.live) - running, used_blocks=len(self.live)),
            prompt_tokens=self.computed,
            prefix_queries=self.queries,
            prefix_hits=self.hits,
            leases=self.leases,
            idle=not (self.live or self.leases),
        )

    def _advance(self, one: Sequence) -> None:
        prompt, how, cached = one.submit.tokens, one.submit.sampling, 0
        if one.made == one.given and not one.candidate:
            cached = BLOCK * sum(hash in self.seen for hash in one.submit.hashes)
            self.seen.update(one.submit.hashes)
            self.queries, self.hits, self.computed = self.queries + len(prompt), self.hits + cached, self.computed + len(prompt) - cached
        biased = next((token for token, bias in how.logit_bias.items() if bias == 100), None)
        tokens: list[int] = []
        finish = None
        while finish is None and len(tokens) < self.per_step:
            made = one.made + len(tokens)
            token = prompt[(made + one.candidate) % len(prompt)] if biased is None else biased
            tokens.append(token)
            ends = (token == EOS and not how.ignore_eos) or token in how.stop_token_ids
            finish = "stop" if ends and made >= how.min_tokens else "length" if made + 1 == how.max_tokens else None
        finish = self.finished(one, finish)
        scores = _scores(prompt, how) if one.made == one.given and not one.candidate else None
        told = Tokens(*one.key, one.made, tokens, finish, *_logprobs(tokens, one.candidate, how), cached, 0.25, prompt=scores)
        one.arriving.put_nowait(told)
        one.made += len(tokens)
        if finish is not None:
            del self.live[one.key]

    def finished(self, one: Sequence, finish: str | None) -> str | None:
        return finish


def _logprobs(tokens: list[int], candidate: int, how: Sampling) -> tuple[list[float] | None, list[list[tuple[int, float]]] | None]:
    if how.logprobs is None:
        return None, None
    own = -(1 + 3 * candidate % 5) / 10
    return [own] * len(tokens), [[((token + k) % 256, own - k) for k in range(how.logprobs)] for token in tokens]


def _scores(prompt: list[int], how: Sampling) -> list[Scored] | None:
    if how.prompt_logprobs is None:
        return None
    return [
        Scored(-at / 10, at, [((token + k) % 256, -k / 10) for k in range(how.prompt_logprobs)]) for at, token in enumerate(prompt) if at
    ]
