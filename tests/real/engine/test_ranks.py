"""Several ranks make what one makes, token for token, whatever cuts the work up; each holds and reads its own part alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from pdlab.core.types import UsageError
from pdlab.real.engine.load import load
from pdlab.real.engine.messages import Sampling
from pdlab.real.engine.options import EngineOptions
from pdlab.real.engine.runner import Piece
from pdlab.real.models.experts import RoutedPass
from pdlab.real.models.feed_forward import GatedPass
from pdlab.real.models.ranks import SummedPass
from tests.support import tiny_models
from tests.support.engine_driver import Driver
from tests.support.rank_threads import RankThreads

Tiny = Callable[[str], tuple[Path, PreTrainedModel]]
GREEDY = Sampling(max_tokens=8, temperature=0.0)
CASES = [*((family, 2) for family in tiny_models.FAMILIES), ("llama", 4), ("qwen3", 4)]  # qwen3 has one KV head
SPREAD = [  # experts: one rank's each, or shared out among two pairs of ranks
    *(("qwen3-moe", 2, 2), ("mixtral", 4, 4), ("ernie4_5-moe", 2, 2), ("deepseek-v3", 2, 2), ("gpt-oss", 2, 2), ("llama4", 2, 2)),
    *(("qwen3-moe", 4, 2), ("deepseek-v3", 4, 2), ("gpt-oss", 4, 2), ("llama4", 4, 2)),
]


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(300) for _ in range(rng.choice((1, 4, 17, 40)))] for _ in range(count)]


def outputs(d: Driver, sampling: Sampling = GREEDY, *, repeats: int = 1) -> dict[tuple[int, int], list[int]]:
    for repeat in range(repeats):
        for i, prompt in enumerate(prompts(6)):
            d.submit(10 * repeat + i, prompt, sampling)
        d.run()
    return d.tokens


@pytest.mark.parametrize(("family", "tp"), CASES)
def test_greedy_tokens_are_transformers(family: str, tp: int, driver: Callable[..., Driver], tiny: Tiny) -> None:
    """In chunks, with prefix hits, and after preemption."""
    expected = [tiny_models.greedy(tiny(family)[1], prompt, GREEDY.max_tokens) for prompt in prompts(6)]
    roomy, tight = driver(family, tp=tp, max_batch_tokens=24), driver(family, tp=tp, max_batch_tokens=24, kv_blocks=24)
    found = outputs(roomy, repeats=2)
    assert [found[10 * repeat + i, 0] for repeat in (0, 1) for i in range(6)] == 2 * expected
    assert roomy.engine.prefix_hits > 0
    assert (found := outputs(tight)) and [found[i, 0] for i in range(6)] == expected
    assert tight.engine.scheduler.preemptions > 0


@pytest.mark.parametrize(("family", "tp", "ep"), SPREAD)
def test_experts_spread_over_the_ranks_make_the_same_tokens(
    family: str, tp: int, ep: int, driver: Callable[..., Driver], tiny: Tiny
) -> None:
    expected = [tiny_models.greedy(tiny(family)[1], prompt, GREEDY.max_tokens) for prompt in prompts(6)]
    found = outputs(driver(family, tp=tp, ep=ep, max_batch_tokens=24))
    assert [found[i, 0] for i in range(6)] == expected


@pytest.mark.parametrize(("tp", "ep"), [(2, 1), (2, 2), (4, 2)])
def test_each_rank_holds_some_experts_whole_or_columns_of_all_or_of_some(tp: int, ep: int, tiny: Tiny) -> None:
    options = EngineOptions(model=str(tiny("gpt-oss")[0]), block_tokens=4, kv_blocks=10, tp=tp, ep=ep)
    with ExitStack() as stack:
        ranks = RankThreads(options, stack)
        for rank, runner in enumerate((ranks.loaded.engine.runner, *(ranks.runners[other] for other in range(1, tp)))):
            feed = runner.model.layers[0].feed_forward
            assert isinstance(feed, SummedPass)
            routed = feed.part
            assert isinstance(routed, RoutedPass)
            group, within = divmod(rank, tp // ep)
            assert (len(routed.gate_up), routed.first) == ((2, 2 * group) if ep > 1 else (4, 0))
            width = 96 // (tp // ep)
            assert tuple(routed.gate_up[0].weight.shape) == (2 * width, 64)  # type: ignore[union-attr]
            assert tuple(routed.down[0].weight.shape) == (64, width)  # type: ignore[union-attr]
            assert (routed.down[0].bias is None) == (within > 0), "added once"


@pytest.mark.parametrize("quantization", ["wint8", "wint4"])
@pytest.mark.parametrize(("family", "ep"), [("qwen3-moe", 2), ("gpt-oss", 1), ("gpt-oss", 2), ("llama4", 1)])
def test_quantised_experts_are_those_of_one_rank(family: str, ep: int, quantization: str, driver: Callable[..., Driver]) -> None:
    one, several = (driver(family, tp=n, ep=min(n, ep), quantization=quantization).engine.runner for n in (1, 2))
    prompt = [random.Random(5).randrange(300) for _ in range(30)]
    a, b = (runner.run([Piece(prompt, 0, list(range(20)), True)]) for runner in (one, several))
    assert (a - b).norm() / a.norm() < (0.5 if quantization == "wint4" else 1e-3)


@pytest.mark.parametrize(("family", "tp"), [("llama-tied-biased", 2), ("qwen2", 4), ("qwen3", 4)])
@pytest.mark.parametrize("quantization", ["", "wint8", "wint4"])
def test_logits_are_those_of_one_rank(family: str, tp: int, quantization: str, driver: Callable[..., Driver]) -> None:
    """Of wint4 where groups of 32 fill each rank's columns; else these stay in 8 bits, which is nearer to the original."""
    one, several = (driver(family, tp=n, quantization=quantization).engine.runner for n in (1, tp))
    prompt = [random.Random(5).randrange(300) for _ in range(70)]
    for piece in (Piece(prompt, 0, list(range(20)), True), Piece([7], 70, list(range(20)), True)):
        a, b = one.run([piece]), several.run([piece])
        assert (a - b).norm() / a.norm() < (0.3 if quantization == "wint4" else 1e-4)


@pytest.mark.parametrize("sampling", [Sampling(max_tokens=6, seed=3, best_of=3), Sampling(max_tokens=3, logprobs=2, prompt_logprobs=1)])
def test_seeds_candidates_and_scores_are_alike(sampling: Sampling, driver: Callable[..., Driver]) -> None:
    one, several = driver("llama"), driver("llama", tp=2)
    assert outputs(one, sampling) == outputs(several, sampling)
    for key, told in one.outputs.items():
        for a, b in zip(told, several.outputs[key], strict=True):
            assert torch.allclose(torch.tensor(a.logprobs or [0.0]), torch.tensor(b.logprobs or [0.0]), atol=1e-4)
            assert [(s.rank, [t for t, _ in s.top]) for s in a.prompt or []] == [(s.rank, [t for t, _ in s.top]) for s in b.prompt or []]


def test_each_rank_holds_its_own_heads_and_columns(tiny: Tiny) -> None:
    options = EngineOptions(model=str(tiny("llama")[0]), block_tokens=4, kv_blocks=10, tp=2)
    with ExitStack() as stack:
        ranks = RankThreads(options, stack)
        for runner in (ranks.loaded.engine.runner, ranks.runners[1]):
            assert runner.kv.shape[3] == 1  # of two KV heads
            layer = runner.model.layers[0]
            assert isinstance(layer.feed_forward, GatedPass)
            linears = (layer.attention.qkv, layer.out, layer.feed_forward.gate_up, layer.feed_forward.down)
            shapes = [tuple(linear.weight.shape) for linear in linears]  # type: ignore[union-attr]
            assert shapes == [(2 * 16 + 2 * 16, 64), (64, 32), (96, 64), (64, 48)]
            assert tuple(runner.model.embedding.weight.shape) == (150, 64)


@pytest.mark.parametrize(
    ("tp", "says"),
    [
        (3, "tp 3 does not divide the 4 attention heads of"),
        (8, "tp 8 does not divide the 4 attention heads of"),
    ],
)
def test_ranks_that_do_not_fit_are_refused(tp: int, says: str, tiny: Tiny) -> None:
    with pytest.raises(UsageError, match=f"{says} .*: choose one of 1, 2, 4$"):
        load(EngineOptions(model=str(tiny("llama")[0]), kv_blocks=10, tp=tp))


@pytest.mark.parametrize(
    ("family", "tp", "ep", "says"),
    [
        ("llama", 2, 2, "ep 2: .* has no routed experts to spread"),
        ("qwen3-moe", 4, 3, "ep 3 does not divide tp 4"),
    ],
)
def test_experts_that_cannot_be_spread_are_refused(family: str, tp: int, ep: int, says: str, tiny: Tiny) -> None:
    with pytest.raises(UsageError, match=says):
        load(EngineOptions(model=str(tiny(family)[0]), kv_blocks=10, tp=tp, ep=ep))
