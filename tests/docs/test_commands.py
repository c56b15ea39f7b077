"""What the docs tell a reader to type does work: `session.py` has the rules."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.pages import DOCS, ROOT, Block, blocks, name, pages
from tests.docs.session import REASONS, Session, commands

NOT_RUN = "not run: "
READ = [page for page in pages() if page.parent in (ROOT, DOCS, *(DOCS / part for part in ("start", "concepts", "guides")))]


def typed(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.language in ("console", "python") or block.title]


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Session]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    session = Session(tmp_path, port)
    yield session
    session.end()


@pytest.mark.parametrize("page", [page for page in READ if any(not b.note.startswith(NOT_RUN) for b in typed(page))], ids=name)
def test_commands_of_a_page_work(page: Path, session: Session) -> None:
    for block in typed(page):
        if not block.note.startswith(NOT_RUN):
            session.play(block)


def test_what_is_not_run_says_why_and_is_the_smaller_part() -> None:
    run, not_run = 0, 0
    for page in READ:
        for block in typed(page):
            count = len(commands(block)) if block.language == "console" else 1
            if block.note.startswith(NOT_RUN):
                reason = block.note.removeprefix(NOT_RUN)
                assert reason in REASONS, f"{name(page)}, line {block.line}: not run: {reason}; one of {', '.join(REASONS)}"
                not_run += count
            else:
                run += count
    print(f"commands in the docs: {run} run, {not_run} not run")
    assert run > not_run


def test_what_is_run_elsewhere_is_run_there() -> None:
    consoles = [block for page in READ for block in blocks(page) if block.language == "console"]
    run = {command for block in consoles if not block.note.startswith(NOT_RUN) for command in commands(block)}
    assert [x for block in consoles if block.note == f"{NOT_RUN}elsewhere" for x in commands(block) if x not in run] == []


@pytest.mark.parametrize("page", READ, ids=name)
def test_shells_are_consoles(page: Path) -> None:
    """So that no command is missed by its block's name."""
    others = [block.line for block in blocks(page) if block.language in ("bash", "sh", "shell", "zsh")]
    assert not others, f"write ```console and `$ ` before commands: lines {others}"
