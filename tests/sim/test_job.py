"""A request on its way, as an object."""

from __future__ import annotations

import pytest

from pdlab.results.timeline import Book, Timeline
from tests.support.small_world import small_world, workload


def test_a_request_has_no_dictionary_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots are quicker to read and to write, and a run has a million requests."""
    with_dictionary = []
    write = Book.write

    def looked_at(book: Book, job: Timeline) -> None:
        with_dictionary.append(hasattr(job, "__dict__"))
        write(book, job)

    monkeypatch.setattr(Book, "write", looked_at)
    small_world(workload([0.0, 0.1], prompt=64, output=8)).run()
    assert with_dictionary == [False, False]
