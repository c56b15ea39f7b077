"""A request on its way, as an object."""

from __future__ import annotations

import pytest

from pdlab.results.timeline import Book, Timeline
from pdlab.sim.moves import TransferMode
from tests.support.small_world import small_world, workload

MOST = 30  # attributes of its own: with more, CPython 3.11 gives each object a dictionary, which is slower to read and to write


@pytest.mark.parametrize("mode", [TransferMode(mode="pull"), TransferMode(mode="pull", first_token="decode")])
def test_an_ordinary_request_has_no_dictionary_of_its_own(mode: TransferMode, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    write = Book.write

    def counted(book: Book, job: Timeline) -> None:
        sizes.append(len(vars(job)))
        write(book, job)

    monkeypatch.setattr(Book, "write", counted)
    small_world(workload([0.0, 0.1], prompt=64, output=8), transfer=mode).run()
    assert len(sizes) == 2
    assert max(sizes) <= MOST
