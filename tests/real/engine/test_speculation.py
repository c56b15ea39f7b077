"""Drafted tokens change how many steps a request takes, and nothing else."""

from __future__ import annotations

import io
import random
from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from pdlab.core.types import UsageError
from pdlab.real.engine.load import load
from pdlab.real.engine.messages import Sampling, StructuredOutputs, Tokens, Vocabulary
from pdlab.real.engine.options import EngineOptions, SpeculationOptions
from pdlab.replay.scheduler_log import replay
from tests.support import tiny_models
from tests.support.engine_driver import Driver

Tiny = Callable[[str], tuple[Path, PreTrainedModel]]
NGRAM = SpeculationOptions(method="ngram", tokens=4, prompt_lookup_min=1, prompt_lookup_max=3)
GREEDY = Sampling(max_tokens=24, temperature=0.0)


def drafting(tiny: Tiny, family: str, tokens: int = 3) -> SpeculationOptions:
    return SpeculationOptions(method="draft_model", tokens=tokens, model=str(tiny(family)[0]))


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Some of them say things twice."""
    rng = random.Random(seed)
    found = [[rng.randrange(300) for _ in range(rng.choice((1, 4, 17, 30)))] for _ in range(count)]
    return [prompt * (1 + i % 3) for i, prompt in enumerate(found)]


def outputs(d: Driver, sampling: Sampling = GREEDY, repeats: int = 1) -> list[list[int]]:
    for repeat in range(repeats):
        for i, prompt in enumerate(prompts(6)):
            d.submit(10 * repeat + i, prompt, sampling)
        d.run()
    return [d.tokens[id, 0] for id in sorted({id for id, _ in d.tokens})]


def used(d: Driver) -> tuple[int, int, int]:
    speculation = d.engine.speculation
    assert speculation is not None
    return speculation.drafts, speculation.drafted, sum(speculation.accepted)


@pytest.mark.parametrize(("family", "tp"), [("llama", 1), ("qwen2-yarn-windowed", 1), ("deepseek-v3", 1), ("qwen3-moe", 1), ("llama", 2)])
@pytest.mark.parametrize("method", ["ngram", "draft_model"])
def test_greedy_tokens_are_transformers(family: str, tp: int, method: str, driver: Callable[..., Driver], tiny: Tiny) -> None:
    """In chunks, with prefix hits, and after preemption."""
    speculation = NGRAM if method == "ngram" else drafting(tiny, family)
    expected = [tiny_models.greedy(tiny(family)[1], prompt, GREEDY.max_tokens) for prompt in prompts(6)]
    roomy = driver(family, tp=tp, max_batch_tokens=48, speculation=speculation)
    tight = driver(family, tp=tp, max_batch_tokens=48, kv_blocks=36, speculation=speculation)
    assert outputs(roomy, repeats=2) == 2 * expected
    assert roomy.engine.prefix_hits > 0
    assert outputs(tight) == expected
    assert tight.engine.scheduler.preemptions > 0
    counted = 0 if method == "ngram" else 2  # nothing that is drawn at random follows as it did before
    assert used(roomy)[counted] > 0 < used(tight)[counted]


@pytest.mark.parametrize("method", ["ngram", "draft_model"])
def test_the_same_seed_gives_the_same_tokens_with_drafts_and_without(method: str, driver: Callable[..., Driver], tiny: Tiny) -> None:
    """Whatever else alters what is drawn; log-probabilities included."""
    speculation = NGRAM if method == "ngram" else drafting(tiny, "llama")
    alone, helped = driver("llama"), driver("llama", speculation=speculation)
    rng = random.Random(3)
    for i, prompt in enumerate(prompts(24, seed=7)):
        sampling = Sampling(
            max_tokens=rng.randrange(1, 30),
            temperature=rng.choice((0.0, 0.15, 0.7)),
            seed=i,
            top_p=rng.choice((1.0, 0.9)),
            top_k=rng.choice((0, 20)),
            logit_bias={7: 30.0, 8: 29.0, 9: 28.0} if i % 3 == 0 else {},
            logprobs=rng.choice((None, 0, 3)),
            prompt_logprobs=rng.choice((None, None, 1)),
            frequency_penalty=rng.choice((0.0, 0.0, 0.4)),
            repetition_penalty=rng.choice((1.0, 1.0, 1.2)),
            min_tokens=rng.choice((0, 1)),
            stop_token_ids=tuple(rng.randrange(300) for _ in range(20)),
            bad_words={"x": ((rng.randrange(300), rng.randrange(300)),)},
            best_of=rng.choice((1, 1, 2)),
        )
        for d in (alone, helped):
            d.arrivals.append(lambda d=d, i=i, prompt=prompt, sampling=sampling: d.submit(i, prompt, sampling))  # type: ignore[misc]
    for d in (alone, helped):
        d.run()
    assert helped.tokens == alone.tokens
    assert helped.finish == alone.finish
    assert used(helped)[2] > 0
    for key, parts in alone.outputs.items():
        assert scores(helped.outputs[key]) == [(token, pytest.approx(p, abs=1e-4), top) for token, p, top in scores(parts)]


def scores(parts: list[Tokens]) -> list[tuple[int, float, tuple[int, ...]]]:
    found = []
    for part in parts:
        for at, token in enumerate(part.tokens):
            p = part.logprobs[at] if part.logprobs is not None else 0.0
            found.append((token, p, tuple(token for token, _ in part.top[at]) if part.top is not None else ()))
    return found


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"seed": 3}, {}], ids=["greedy", "seeded", "drawn"])
def test_a_model_that_drafts_for_itself_is_always_right(sampling: dict[str, float], driver: Callable[..., Driver], tiny: Tiny) -> None:
    """So each pass makes all of its draft, and one more: its KV goes along with what was accepted, through chunks of a long prompt, and
    with what the prefix cache shares."""
    d = driver("qwen3", max_batch_tokens=20, speculation=drafting(tiny, "qwen3", tokens=4))
    prompt = prompts(1, seed=5)[0] * 3 + list(range(60))
    for id in range(2):
        d.submit(id, prompt, Sampling(max_tokens=31, ignore_eos=True, **sampling))  # type: ignore[arg-type]
        d.run()
        if sampling.get("temperature") == 0.0:
            assert d.tokens[id, 0] == tiny_models.greedy(tiny("qwen3")[1], prompt, 31)
    drafts, drafted, accepted = used(d)
    assert accepted == drafted
    assert drafts <= 2 * -(-31 // 5) + 1


def chances(model: PreTrainedModel, prompt: list[int], length: int, temperature: float, presence_penalty: float) -> torch.Tensor:
    """Of every output of so many tokens, in lexical order, float64."""
    vocab = model.config.vocab_size
    outputs = torch.tensor(list(product(range(vocab), repeat=length)))
    with torch.inference_mode():
        logits = model(torch.cat([torch.tensor(prompt).expand(len(outputs), -1), outputs[:, :-1]], 1)).logits[:, len(prompt) - 1 :].double()
    found = torch.ones(len(outputs), dtype=torch.float64)
    for at in range(length):
        made = torch.nn.functional.one_hot(outputs[:, :at], vocab).amax(1) if at else 0.0
        odds = ((logits[:, at] - presence_penalty * made) / temperature).softmax(-1)
        found *= odds.gather(1, outputs[:, at : at + 1]).squeeze(1)
    return found


def test_what_is_drawn_with_drafts_is_distributed_as_without(tmp_path: Path) -> None:
    """Every output of four tokens of a vocabulary of four, beside its chance by transformers; through several batches, each of which
    verifies two drafts of another model that has other odds. The engine's seed is fixed."""
    folders = [tmp_path / family for family in ("llama", "qwen2")]
    model, _ = (tiny_models.make(folder.name, folder, vocab_size=4) for folder in folders)
    options = EngineOptions(
        model=str(folders[0]), kv_blocks=2000, speculation=SpeculationOptions(method="draft_model", tokens=2, model=str(folders[1]))
    )
    d = Driver(load(options).engine)
    sampling = Sampling(max_tokens=4, temperature=0.7, presence_penalty=0.5)
    for id in range(requests := 3000):
        d.submit(id, [1, 0, 2, 2, 3], sampling)
    d.run()
    expected = requests * chances(model, [1, 0, 2, 2, 3], 4, sampling.temperature, sampling.presence_penalty)
    made = Counter(sum(token * 4**place for place, token in enumerate(reversed(tokens))) for tokens in d.tokens.values())
    seen = torch.tensor([made[i] for i in range(len(expected))], dtype=torch.float64)
    common = expected >= 5
    square = ((seen - expected) ** 2 / expected)[common].sum() / common.sum()
    assert square < 1 + 4 * (2 / int(common.sum())) ** 0.5
    drafts, drafted, accepted = used(d)
    assert requests <= drafts
    assert drafted // 5 < accepted < drafted


def test_another_model_drafts_for_it(driver: Callable[..., Driver], tiny: Tiny) -> None:
    d = driver("llama", speculation=drafting(tiny, "qwen2"))
    assert outputs(d) == outputs(driver("llama"))
    drafts, drafted, accepted = used(d)
    assert 0 <= accepted < drafted
    assert drafts > 0


def test_a_model_of_another_vocabulary_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    tiny_models.make("llama", tmp_path, vocab_size=320)
    speculation = SpeculationOptions(method="draft_model", tokens=2, model=str(tmp_path))
    with pytest.raises(UsageError, match=r"vocabulary of 320 tokens, and .* one of 300"):
        load(EngineOptions(model=str(tiny("llama")[0]), speculation=speculation))


def test_a_grammar_is_followed_through_drafts(driver: Callable[..., Driver], tiny: Tiny) -> None:
    from pdlab.real.engine.grammar import Grammars

    vocabulary = Vocabulary([bytes([i]) if i < 256 else b"<%d>" % i for i in range(300)], list(range(256, 300)), (299,))
    structured = StructuredOutputs(regex="(ab|cd|a[0-9]){12}")
    sampling = Sampling(max_tokens=40, temperature=0.8, seed=5, structured=structured)
    found = []
    for speculation in (None, NGRAM, drafting(tiny, "llama")):
        d = driver("llama", speculation=speculation, eos_ids=(299,))
        grammars = Grammars(vocabulary)
        grammars.keep(structured, grammars.compile(structured))
        d.engine.grammars = grammars
        outputs_of = [d.submit(id, list(b"abcdabcd"), sampling) for id in range(2)]
        assert outputs_of
        d.run()
        found.append((d.tokens, d.finish))
    assert found[0] == found[1] == found[2]
    assert bytes(found[0][0][0, 0][:24]).startswith((b"a", b"c"))
    assert used(d)[2] >= 0


def test_the_log_of_a_scheduler_with_drafts_replays(tiny: Tiny) -> None:
    log = io.BytesIO()
    options = EngineOptions(model=str(tiny("llama")[0]), block_tokens=4, kv_blocks=36, max_batch_tokens=40, speculation=NGRAM)
    d = Driver(load(options, log).engine)
    outputs(d)
    assert b'{"accept"' in log.getvalue()
    alike, difference = replay(log.getvalue().splitlines())
    assert not difference
    assert alike > 10


def test_what_is_told_of_steps_is_the_time_of_one_token(driver: Callable[..., Driver], tiny: Tiny) -> None:
    d = driver("llama", speculation=drafting(tiny, "llama", tokens=3))
    d.submit(0, [1, 2, 3, 4], Sampling(max_tokens=21, temperature=0.0, ignore_eos=True))
    passes = 0
    while not d.engine.idle:
        d.step()
        if d.engine.batch is not None and d.engine.batch.decodes:
            passes += 1
            d.engine.worker.meter.took(d.engine.batch, 0, d.now, 0.004, 1, 0.004, d.engine.each)
    report = d.engine.load([], d.now).report
    assert passes == 5
    assert report.decode_s == pytest.approx(5 * 0.001 + 4 * 0.006 / 4)
    assert [step.seconds for step in report.steps] == [pytest.approx(0.001)]
    told = d.engine.load([], d.now)
    assert (told.drafts, told.drafted_tokens, told.accepted_tokens) == (5, 15, [5, 5, 5])
