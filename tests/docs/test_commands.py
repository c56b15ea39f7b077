"""What the docs tell a reader to type does work: `session.py` has the rules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.pages import DOCS, ROOT, Block, blocks, name, pages
from tests.docs.session import REASONS, Session, commands
from tests.support.ports import free_port

NOT_RUN = "not run: "
READ = [page for page in pages() if page.parent in (ROOT, DOCS, *(DOCS / part for part in ("start", "concepts", "guides")))]


def typed(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.language in ("console", "python") or block.title]


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Session]:
    session = Session(tmp_path, free_port())
    yield session
    session.end()


def played(page: Path, *, slow: bool) -> list[Block]:
    return [b for b in typed(page) if not b.note.startswith(NOT_RUN) and (slow or b.note != "slow")]


@pytest.mark.parametrize("page", [page for page in READ if played(page, slow=False)], ids=name)
def test_commands_of_a_page_work(page: Path, session: Session) -> None:
    for block in played(page, slow=False):
        session.play(block)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in READ if any(b.note == "slow" for b in typed(page))], ids=name)
def test_slow_commands_of_a_page_work(page: Path, session: Session) -> None:
    for block in played(page, slow=True):
        session.play(block)


def test_what_is_not_run_says_why_and_is_the_smaller_part() -> None:
    counts = Counter[str]()
    for page in READ:
        for block in typed(page):
            reason = block.note.removeprefix(NOT_RUN)
            assert reason == block.note or reason in REASONS, f"{name(page)}, line {block.line}: {block.note}; one of {', '.join(REASONS)}"
            kind = "not run" if reason != block.note else "slow" if block.note == "slow" else "run"
            counts[kind] += len(commands(block)) if block.language == "console" else 1
    print("commands in the docs:", dict(counts))
    assert counts["run"] > counts["not run"]


def test_what_is_run_elsewhere_is_run_there() -> None:
    consoles = [block for page in READ for block in blocks(page) if block.language == "console"]
    run = {command for block in consoles if not block.note.startswith(NOT_RUN) for command in commands(block)}
    assert [x for block in consoles if block.note == f"{NOT_RUN}elsewhere" for x in commands(block) if x not in run] == []


@pytest.mark.parametrize("page", READ, ids=name)
def test_shells_are_consoles(page: Path) -> None:
    """So that no command is missed by its block's name."""
    others = [block.line for block in blocks(page) if block.language in ("bash", "sh", "shell", "zsh")]
    assert not others, f"write ```console and `$ ` before commands: lines {others}"
