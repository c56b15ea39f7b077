"""The docs can be read: the words of a paragraph and a sentence have a bound, and the README's lines."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.pages import FENCE, PART, ROOT, name, pages

MOST_PARAGRAPH_WORDS = 80
MOST_SENTENCE_WORDS = 25  # as a rule
LONG_SHARE = 0.1
MOST_README_LINES = 120
ITEM = re.compile(r"^(?:[-*] |\d+\. )")
NO_PROSE = re.compile(r"^(?:#|\||<|!!!|\?\?\?|===|::: |!\[)")
ABBREVIATIONS = re.compile(r"\b(e\.g|i\.e|vs|etc|cf|No|al)\.")


def paragraphs(page: Path) -> list[str]:
    """Each paragraph and each item of a list, without code, tables, headings, comments, and what the code writes."""
    text = re.sub(r"<!--.*?-->", "", PART.sub("", page.read_text(encoding="utf-8")), flags=re.DOTALL)
    there: list[list[str]] = [[]]
    fenced = False
    for line in (x.strip() for x in text.splitlines()):
        if FENCE.match(line):
            fenced = not fenced
            there.append([])
        elif fenced:
            continue
        elif not line or NO_PROSE.match(line):
            there.append([])
        elif ITEM.match(line):
            there.append([ITEM.sub("", line)])
        else:
            there[-1].append(line)
    return [plain(" ".join(lines)) for lines in there if lines]


def plain(text: str) -> str:
    """Links count as their words, code as one word."""
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text)
    return ABBREVIATIONS.sub(r"\1", re.sub(r"`[^`]+`", "code", text))


def sentences(paragraph: str) -> list[str]:
    return [x for x in re.split(r"(?<=[.!?])[)*\"]*\s+(?=[\"*(]*[A-Z0-9c])|(?<=:)\s+(?=[A-Z])", paragraph) if x.strip()]


@pytest.mark.parametrize("page", pages(), ids=name)
def test_paragraphs_are_short(page: Path) -> None:
    long = [f"{len(p.split())} words: {p[:60]} ..." for p in paragraphs(page) if len(p.split()) > MOST_PARAGRAPH_WORDS]
    assert not long, "\n".join(long)


@pytest.mark.parametrize("page", pages(), ids=name)
def test_long_sentences_are_few(page: Path) -> None:
    every = [s for p in paragraphs(page) for s in sentences(p)]
    long = [f"{len(s.split())} words: {s}" for s in every if len(s.split()) > MOST_SENTENCE_WORDS]
    assert len(long) <= max(1, LONG_SHARE * len(every)), "\n".join(long)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= MOST_README_LINES


def test_what_is_measured() -> None:
    assert sentences("It has one. The other (see code) is long! 3 are there: They count.") == [
        "It has one.",
        "The other (see code) is long!",
        "3 are there:",
        "They count.",
    ]
    assert plain("See [the page](a.md#b), `pdlab sim x --y`.") == "See the page, code."
