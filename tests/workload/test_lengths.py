"""Lengths follow the distribution that an experiment names."""

from __future__ import annotations

import gzip
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from pdlab.core.types import UsageError
from pdlab.workload.lengths import MOST, Distribution, Lengths, draw, normal_quantile, read

PARSED: TypeAdapter[Distribution] = TypeAdapter(Lengths)


def tokens(lengths: Any, count: int = 20_000) -> NDArray[np.int32]:
    return draw(PARSED.validate_python(lengths), np.random.default_rng(0).random(count))


def test_a_number_is_every_length() -> None:
    assert set(tokens(1024).tolist()) == {1024}
    assert tokens(1024).dtype == np.int32


def test_uniform_includes_both_ends() -> None:
    values, counts = np.unique(tokens({"uniform": [3, 6]}), return_counts=True)
    assert values.tolist() == [3, 4, 5, 6]
    assert np.all(np.abs(counts / 5000 - 1) < 0.06)


@pytest.mark.parametrize("given", [{"median": 1000, "cv": 1.0}, {"mean": 1000, "cv": 0.5}, {"mean": 800, "sigma": 0.7}])
def test_lognormal_has_its_median_or_mean_and_its_spread(given: dict[str, float]) -> None:
    drawn = tokens({"lognormal": given}, 200_000).astype(float)
    if "median" in given:
        assert np.median(drawn) == pytest.approx(given["median"], rel=0.02)
    else:
        assert drawn.mean() == pytest.approx(given["mean"], rel=0.02)
    if "cv" in given:
        assert drawn.std() / drawn.mean() == pytest.approx(given["cv"], rel=0.05)
    else:
        assert np.log(drawn).std() == pytest.approx(given["sigma"], rel=0.02)


def test_lognormal_stays_below_its_maximum_and_within_bounds() -> None:
    assert tokens({"lognormal": {"median": 1000, "cv": 1.0, "max": 2000}}).max() == 2000
    wild = tokens({"lognormal": {"median": 10, "sigma": 30.0}})
    assert (wild.min(), wild.max()) == (1, MOST)


def test_empirical_interpolates_between_quantiles() -> None:
    table = PARSED.validate_python({"empirical": [[0, 1], [0.5, 101], [1, 1001]]})
    assert draw(table, np.array([0.0, 0.25, 0.5, 0.75, 1.0])).tolist() == [1, 51, 101, 551, 1001]


@pytest.mark.parametrize("pack", [lambda text: text, gzip.compress])
def test_a_file_of_lengths_is_a_distribution(tmp_path: Path, pack: Any) -> None:
    values = np.random.default_rng(1).integers(5, 500, 3000)
    (tmp_path / "lengths.txt").write_bytes(pack(("# tokens\n" + "\n".join(map(str, values)) + "\n").encode()))
    found = read(PARSED.validate_python({"empirical": "lengths.txt"}), tmp_path)
    assert found is not None
    drawn = draw(found, np.random.default_rng(0).random(20_000))
    assert np.quantile(drawn, (0.1, 0.5, 0.9)) == pytest.approx(np.quantile(values, (0.1, 0.5, 0.9)), rel=0.05)


def test_a_file_of_one_length_is_constant(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("7\n")
    found = read(Distribution(empirical="one.txt"), tmp_path)
    assert found is not None
    assert set(draw(found, np.random.default_rng(0).random(10)).tolist()) == {7}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("5\nx\n", "line 2: 'x' is not a whole number of tokens"),
        ("5\n\n0\n", "line 3: 0 tokens; must be from 1"),
        ("# none\n", "no lengths"),
    ],
)
def test_a_broken_file_of_lengths_is_named_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "lengths.txt").write_text(text)
    with pytest.raises(UsageError, match=f"lengths.txt: {said}"):
        read(Distribution(empirical="lengths.txt"), tmp_path)


@pytest.mark.parametrize(
    ("lengths", "said"),
    [
        (0, "greater than or equal to 1"),
        ({}, "not none"),
        ({"constant": 3, "uniform": [1, 2]}, "not constant and uniform"),
        ({"uniform": [5, 2]}, "ends before it begins"),
        ({"lognormal": {"cv": 1}}, "either median or mean"),
        ({"lognormal": {"median": 1, "mean": 2, "cv": 1}}, "either median or mean"),
        ({"lognormal": {"median": 1, "cv": 1, "sigma": 1}}, "either cv or sigma"),
        ({"empirical": [[0, 1], [0.5, 2]]}, "from quantile 0 to 1"),
        ({"empirical": [[0, 5], [1, 2]]}, "ascending"),
        ({"empirical": [[0, 0], [1, 2]]}, "of 1 token and more"),
    ],
    ids=str,
)
def test_impossible_lengths_are_refused(lengths: Any, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        PARSED.validate_python(lengths)


def test_the_normal_quantile_is_right_far_into_the_tails() -> None:
    p = np.concatenate(([1e-9, 1e-4, 0.02425, 1 - 1e-6], np.linspace(0.001, 0.999, 999)))
    assert normal_quantile(p) == pytest.approx([NormalDist().inv_cdf(x) for x in p], rel=1e-7, abs=1e-8)
