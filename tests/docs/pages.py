"""The pages of the docs: which there are, and the fenced blocks in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
FENCE = re.compile(r"^( *)```+ *(\w*) *(.*)$")
TITLE = re.compile(r'title="([^"]+)"')
PART = re.compile(r"<!-- generated: (.+?) -->\n(.*?)<!-- end -->", re.DOTALL)
COMMENT = re.compile(r"^<!-- *(.*?) *-->$")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block. `note` is what the HTML comment in the line before it says."""

    language: str
    title: str | None
    note: str
    line: int
    text: str


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[Block]:
    lines = page.read_text(encoding="utf-8").splitlines()
    there: list[Block] = []
    begin: int | None = None
    for k, line in enumerate(lines):
        fence = FENCE.match(line)
        if fence is None:
            continue
        if begin is None:
            begin, opened = k, fence
            continue
        title = TITLE.search(opened[3])
        inside = "\n".join(x.removeprefix(opened[1]) for x in lines[begin + 1 : k]) + "\n"
        there.append(Block(opened[2], title and title[1], note_before(lines, begin), begin + 1, inside))
        begin = None
    assert begin is None, f"{name(page)}: the block that begins at line {begin} has no end"
    return there


def note_before(lines: list[str], begin: int) -> str:
    before = next((line.strip() for line in reversed(lines[:begin]) if line.strip()), "")
    comment = COMMENT.match(before)
    return comment[1] if comment else ""
