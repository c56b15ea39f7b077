"""What an id of a prefix stands for, from how many of them prompts have."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdlab.core.types import UsageError
from pdlab.workload.hash_unit import HashUnit
from pdlab.workload.text import TextFile


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TextFile]:
    path = tmp_path_factory.mktemp("unit") / "t.jsonl"
    path.write_text("{}\n")
    with TextFile(path) as file:
        yield file


def unit_of(file: TextFile, *rows: tuple[int, int], stated: int | None = None) -> int:
    unit = HashUnit(file, "hash_ids", stated)
    for prompt_tokens, ids in rows:
        unit.see(prompt_tokens, ids)
    return unit.tokens


@pytest.mark.parametrize(
    ("rows", "tokens"),
    [
        ([(6758, 14), (7322, 15)], 512),
        ([(1024, 2), (511, 1)], 512),
        ([(1024, 64)], 16),
        ([(1000, 63), (17, 2)], 16),  # the last is of a part
        ([(1000, 62), (33, 2)], 16),  # whole ones only
        ([(1000, 8)], 128),
        ([(655, 3)], 256),
        ([(1000, 10), (1001, 11), (1, 1)], 100),
        ([(5, 1), (20, 1)], 512),  # nothing says otherwise
        ([(1024, 0), (1024, 64)], 16),
    ],
)
def test_the_unit_that_all_rows_allow(file: TextFile, rows: list[tuple[int, int]], tokens: int) -> None:
    assert unit_of(file, *rows) == tokens


@given(st.sampled_from([1, 8, 16, 32, 64, 128, 256, 512]), st.booleans(), st.lists(st.integers(1, 100_000), min_size=1, max_size=30))
def test_rows_of_one_unit_never_contradict_each_other(file: TextFile, tokens: int, whole: bool, lengths: list[int]) -> None:
    ids = [length // tokens if whole else -(-length // tokens) for length in [*lengths, 100_000]]
    unit = HashUnit(file, "hash_ids", None)
    for length, count in zip([*lengths, 100_000], ids, strict=True):
        unit.see(length, count)
    assert unit.tokens == tokens


@pytest.mark.parametrize(
    ("rows", "stated", "said"),
    [
        ([(1000, 2), (1024, 64)], None, "64 ids for 1,024 tokens do not go with 512 tokens each, as the rows above"),
        ([(10, 11)], None, "11 ids for 10 tokens do not go with any number of tokens"),
        ([(1024, 64)], 512, "64 ids for 1,024 tokens do not go with 512 tokens each; hash_tokens says"),
        ([(1000, 2)], 16, "2 ids for 1,000 tokens do not go with 16 tokens each"),
        ([(600, 1)], None, "512"),
    ],
)
def test_a_row_that_contradicts_is_named(file: TextFile, rows: list[tuple[int, int]], stated: int | None, said: str) -> None:
    if said == "512":  # one whole unit is as good as one begun of more
        assert unit_of(file, *rows) == 512
        return
    with pytest.raises(UsageError) as caught:
        unit_of(file, *rows, stated=stated)
    assert said in str(caught.value)
    assert "column hash_ids" in str(caught.value)


def test_what_rows_leave_open_is_for_the_user_to_say(file: TextFile) -> None:
    with pytest.raises(UsageError, match=r"an id may stand for .* tokens; hash_tokens says which"):
        unit_of(file, (5000, 1))
    assert unit_of(file, (5000, 3), stated=2000) == 2000
