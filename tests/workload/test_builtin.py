"""Built-ins are like the traces they are named after: lengths, how these go together, arrivals, shared prefixes."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from pdlab.workload import builtin, fit
from pdlab.workload.base import Workload
from pdlab.workload.readers import load
from pdlab.workload.stats import arrivals, correlation, prefix, ranks

DATA = Path(__file__).resolve().parents[2] / "../shared/data"
WITH_TIMES = ("azure-code-2023", "azure-conv-2023", "mooncake-conversation")
SEEDS = (0, 1, 2)
CAPACITIES = (1_000, 5_000, 10_000, 30_000, 50_000, 100_000)


def path(name: str) -> Path:
    found = DATA / "traces" / fit.FILES[name]
    if not found.exists():
        pytest.skip(f"{found} is not here; the built-in cannot be compared with its trace")
    return found


@cache
def real(name: str) -> Workload:
    if name in WITH_TIMES:
        return load(path(name))
    prompts, outputs = (column.astype(np.int32) for column in fit.lengths(path(name)))
    return Workload(name, np.zeros(len(prompts)), prompts, outputs)


@cache
def drawn(name: str, seed: int) -> Workload:
    return builtin.draw(name, builtin.requests(name), np.random.default_rng(seed))


def rank_correlation(workload: Workload) -> float:
    found = correlation(ranks(workload.prompt_tokens), ranks(workload.output_tokens))
    assert found is not None
    return found


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", builtin.NAMES)
def test_lengths_are_within_5_percent_at_p50_p90_p99(name: str, seed: int) -> None:
    trace, made = real(name), drawn(name, seed)
    assert len(made) == len(trace)
    for column in ("prompt_tokens", "output_tokens"):
        wanted = np.quantile(getattr(trace, column), (0.5, 0.9, 0.99))
        assert np.quantile(getattr(made, column), (0.5, 0.9, 0.99)) == pytest.approx(wanted, rel=0.05)


@pytest.mark.parametrize("name", builtin.NAMES)
def test_lengths_go_together_as_the_traces_do(name: str) -> None:
    trace = real(name)
    made = [drawn(name, seed) for seed in SEEDS]
    assert np.mean([rank_correlation(w) for w in made]) == pytest.approx(rank_correlation(trace), abs=0.03)
    longest = int((trace.prompt_tokens + trace.output_tokens).max())
    assert max(int((w.prompt_tokens + w.output_tokens).max()) for w in made) <= longest
    pearson = [correlation(w.prompt_tokens.astype(float), w.output_tokens.astype(float)) for w in (trace, *made)]
    assert pearson[1:] == pytest.approx([pearson[0]] * len(SEEDS), abs=0.06)


@pytest.mark.parametrize("name", WITH_TIMES)
def test_rate_and_burstiness_are_near_the_traces(name: str) -> None:
    wanted = arrivals(real(name))
    found = [arrivals(drawn(name, seed)) for seed in range(5)]
    assert wanted is not None

    def mean(key: str) -> float:
        return float(np.mean([figures[key] for figures in found if figures is not None]))

    for key, tolerance in (("rate_rps", 0.06), ("interarrival_cv", 0.1), ("dispersion_1s", 0.2), ("dispersion_10s", 0.3)):
        assert mean(key) == pytest.approx(wanted[key], rel=tolerance), key


@pytest.mark.parametrize("seed", SEEDS)
def test_mooncake_prefix_hits_are_within_3_points_of_the_trace(seed: int) -> None:
    wanted = prefix(real("mooncake-conversation"), CAPACITIES)
    found = prefix(drawn("mooncake-conversation", seed), CAPACITIES)
    assert found["token_hit_ratio"] == pytest.approx(wanted["token_hit_ratio"], abs=0.03)
    assert found["unit_hit_ratio"] == pytest.approx(wanted["unit_hit_ratio"], abs=0.03)
    for capacity, ratio in wanted["lru_hit_ratio"].items():
        assert found["lru_hit_ratio"][capacity] == pytest.approx(ratio, abs=0.03), capacity


def test_mooncake_caches_warm_up_as_on_the_trace() -> None:
    for count in (1000, 3000):
        wanted = prefix(real("mooncake-conversation").head(count), ())["unit_hit_ratio"]
        found = np.mean([prefix(drawn("mooncake-conversation", seed).head(count), ())["unit_hit_ratio"] for seed in SEEDS])
        assert found == pytest.approx(wanted, abs=0.06)


def test_few_requests_have_the_traces_lengths_too() -> None:
    made = builtin.draw("azure-conv-2023", 500, np.random.default_rng(3))
    assert np.quantile(made.prompt_tokens, (0.5, 0.9)) == pytest.approx(
        np.quantile(real("azure-conv-2023").prompt_tokens, (0.5, 0.9)), rel=0.05
    )


def test_chains_belong_to_their_prompts() -> None:
    made = builtin.draw("mooncake-conversation", 300, np.random.default_rng(0))
    assert made.hashes is not None
    assert [len(chain) for chain in made.hashes] == (made.prompt_tokens // 512).tolist()
    behind: dict[int, tuple[int, ...]] = {}
    for chain in made.hashes:  # one id stands for one prefix
        for end, unit in enumerate(chain, 1):
            assert behind.setdefault(unit, chain[:end]) == chain[:end]


@pytest.mark.parametrize("name", builtin.NAMES)
def test_equal_seeds_draw_equal_workloads(name: str) -> None:
    one, other = (builtin.draw(name, 200, np.random.default_rng(9)) for _ in range(2))
    for column in ("arrival_s", "prompt_tokens", "output_tokens"):
        assert np.array_equal(getattr(one, column), getattr(other, column))
    assert list(one.hashes or ()) == list(other.hashes or ())


@pytest.mark.parametrize("name", ["sharegpt", "arxiv-summarization"])
def test_a_trace_without_times_comes_as_poisson_at_one_a_second(name: str) -> None:
    found = arrivals(drawn(name, 0))
    assert found is not None
    for key in ("rate_rps", "interarrival_cv", "dispersion_10s"):
        assert found[key] == pytest.approx(1.0, abs=0.1)


def flat(figures: object) -> NDArray[np.float64]:
    if isinstance(figures, dict):
        return np.concatenate([flat(figures[key]) for key in sorted(figures)])
    if isinstance(figures, list):
        return np.concatenate([flat(item) for item in figures])
    return np.array([figures], float)


@pytest.mark.parametrize("name", ["mooncake-conversation", "sharegpt"])
def test_the_shipped_figures_are_what_fit_makes(name: str) -> None:
    made = fit.fit(name, path(name).parents[1])
    assert made.keys() == builtin.figures(name).keys()
    assert flat(made) == pytest.approx(flat(builtin.figures(name)), rel=1e-3, abs=1e-3)


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    assert "did you mean sharegpt?" in builtin.unknown("sharegtp")
