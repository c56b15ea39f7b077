"""`make bench-speculation`: what speculative decoding brings pdlab's engine on this machine, with SmolLM2-135M on a CPU.

One engine decodes the same requests with and without drafts, in alternation, so that the ratios hold on a busy machine; medians of all
rounds. With one thread they are of CPU seconds. S is the pass of a decode step without drafts, V that of one that verifies, D one of the
draft model's, each measured in the engine.
`as costed` is what `pdlab.cost.roofline` says of the ratio, (1 + a + ... + a^d) S / (V + d D), with the acceptance a and the seconds that
were measured here; the roofline itself takes V to be S where reading the weights sets the pace.

n-grams draft for a text that repeats itself (greedy) and for one that does not (drawn at temperature 1). The draft models are the served
one itself, whose drafts are all right, and one of its first layers with random weights otherwise, whose drafts are all wrong.

    bench_speculation.py [--dtype float32] [--threads 2] [--tokens 4] [--rounds 5] [--batches 1 8]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from pdlab.real.engine.engine import Engine
from pdlab.real.engine.load import load
from pdlab.real.engine.messages import Sampling, Submit, Tokens
from pdlab.real.engine.options import EngineOptions
from pdlab.real.engine.runner import Runner
from pdlab.real.engine.speculation import ModelDrafter, NgramDrafter, Speculation
from pdlab.real.models import gguf_file

PROMPT, OUTPUT, LAYERS = 128, 64, 4
GREEDY = Sampling(max_tokens=OUTPUT, temperature=0.0, ignore_eos=True)
DRAWN = Sampling(max_tokens=OUTPUT, temperature=1.0, ignore_eos=True)


def clock() -> float:
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


class Timed:
    """A runner whose passes are timed, those of decode steps alone: a prompt's are not."""

    def __init__(self, runner: Runner) -> None:
        self.runner, self.seconds = runner, list[float]()
        self.run_it = runner.run
        runner.run = self.run  # type: ignore[method-assign]

    def run(self, pieces: list, after_layer: Callable[[int], None] | None = None) -> torch.Tensor:  # type: ignore[type-arg]
        start = clock()
        logits = self.run_it(pieces, after_layer)
        if max(len(piece.tokens) for piece in pieces) < PROMPT // 4:
            self.seconds.append(clock() - start)
        return logits

    def median(self) -> float:
        found, self.seconds = self.seconds, []
        return statistics.median(found) if found else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8])
    asked = parser.parse_args()
    print(f"SmolLM2-135M, {asked.dtype}, {asked.threads} threads, {asked.tokens} drafted, {asked.rounds} rounds\n")
    print("| drafts | text | batch | acceptance | tokens a step | S / V / D, ms | tokens/s without | speed-up | as costed |")
    print("|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        options = EngineOptions(
            model=str(gguf_file.default_model()), dtype=asked.dtype, threads=asked.threads, kv_gib=0.2, prefix_cache=False
        )
        engine = load(options).engine
        served = Timed(engine.runner)
        for name, text, sampling, speculation in cases(engine, options, asked.tokens, Path(folder)):
            drafter = speculation.drafter
            drafts = Timed(drafter.runner) if isinstance(drafter, ModelDrafter) else None
            for batch in asked.batches:
                print(row(engine, served, drafts, speculation, batch, text, sampling, asked.rounds, f"| {name} | {text} "), flush=True)


def cases(engine: Engine, options: EngineOptions, tokens: int, folder: Path) -> Iterator[tuple[str, str, Sampling, Speculation]]:
    ngrams = NgramDrafter(2, 4)
    yield "n-grams", "repeats", GREEDY, Speculation(ngrams, tokens)
    yield "n-grams", "does not", DRAWN, Speculation(ngrams, tokens)
    blocks = engine.runner.kv.shape[2]
    itself = Runner(engine.runner.model, kv_blocks=blocks, block_tokens=options.block_tokens)
    yield "itself", "repeats", GREEDY, Speculation(ModelDrafter(itself, options.max_batch_tokens), tokens)
    yield "itself", "does not", DRAWN, Speculation(ModelDrafter(itself, options.max_batch_tokens), tokens)
    config = {**gguf_file.config(Path(options.model)), "num_hidden_layers": LAYERS, "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    small = load(EngineOptions(model=str(folder), load_format="dummy", dtype=options.dtype, threads=options.threads, kv_blocks=2))
    wrong = Runner(small.engine.runner.model, kv_blocks=blocks, block_tokens=options.block_tokens)
    yield f"{LAYERS} layers, wrong", "does not", DRAWN, Speculation(ModelDrafter(wrong, options.max_batch_tokens), tokens)


def prompt(text: str, salt: int) -> list[int]:
    period, salt = (16, 0) if text == "repeats" else (PROMPT, salt)  # what repeats is the same for all, lest they end one by one
    return [(7919 * (i % period + 1) * (salt + 3)) % 40000 + 100 for i in range(PROMPT)]


def decoded(engine: Engine, batch: int, text: str, sampling: Sampling) -> tuple[float, int]:
    """(tokens a second after all have their first, passes)."""
    told: list[tuple[float, int]] = []

    def emit(outputs: list[Tokens]) -> None:
        told.append((clock(), sum(len(o.tokens) for o in outputs)))

    for salt in range(batch):
        engine.submit(Submit(next(IDS), prompt(text, salt), sampling), 0.0)
    while not engine.idle:
        engine.step(0.0, emit, lambda: False)
    made = 0
    for at, (when_s, tokens) in enumerate(told):
        made += tokens
        if made >= batch:
            return sum(tokens for _, tokens in told[at + 1 :]) / (told[-1][0] - when_s), len(told) - at - 1
    raise AssertionError("nothing was decoded")


def row(
    engine: Engine,
    served: Timed,
    drafts: Timed | None,
    speculation: Speculation,
    batch: int,
    text: str,
    sampling: Sampling,
    rounds: int,
    head: str,
) -> str:
    plain, speed_ups, steps, seconds = [], [], [], []
    speculation.drafts = speculation.drafted = 0
    speculation.accepted = [0] * speculation.tokens
    for turn in range(rounds + 1):  # the first warms up
        served.median()
        engine.speculation = None
        rate, _ = decoded(engine, batch, text, sampling)
        alone_s = served.median()
        engine.speculation = speculation
        with_drafts, passes = decoded(engine, batch, text, sampling)
        verify_s, draft_s = served.median(), drafts.median() if drafts is not None else 0.0
        if turn:
            plain.append(rate)
            speed_ups.append(with_drafts / rate)
            steps.append(batch * (OUTPUT - 1) / passes / batch)
            seconds.append((alone_s, verify_s, draft_s))
    engine.speculation = None
    s, v, d = (statistics.median(one) for one in zip(*seconds, strict=True))
    accepted, count = speculation.accepted, speculation.tokens
    a = sum(accepted) / max(speculation.drafts + sum(accepted[:-1]), 1)
    drafting = speculation.drafts / max(
        (rounds + 1) * batch * statistics.median(steps) ** -1 * (OUTPUT - 1), 1
    )  # of steps, those with drafts
    made = 1 + min(drafting, 1.0) * (sum(a**k for k in range(count + 1)) - 1)
    costed = made * s / (v + count * d)
    return (
        f"{head}| {batch} | {a:.2f} | {statistics.median(steps):.2f} | {1e3 * s:.1f} / {1e3 * v:.1f} / {1e3 * d:.1f} "
        f"| {statistics.median(plain):.1f} | {statistics.median(speed_ups):.2f} | {costed:.2f} |"
    )


IDS = iter(range(10**9))

if __name__ == "__main__":
    main()
