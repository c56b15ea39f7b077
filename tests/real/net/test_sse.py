"""Server-sent events, however they are cut and however carelessly they are written."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdlab.real.net import sse
from pdlab.real.net.sse import Events


class Heard:
    """Takes what is JSON-like: that begins with a brace and ends with one."""

    def __init__(self) -> None:
        self.all: list[tuple[bytes, bytes]] = []
        self.events = Events(self.hear)

    def hear(self, data: bytes, name: bytes) -> bool:
        if not (data.startswith(b"{") and data.endswith(b"}")):
            return False
        self.all.append((data, name))
        return True


@given(st.lists(st.integers(0, 200), max_size=6), st.sampled_from([b"\n", b"\r\n", b"\r"]))
def test_where_the_bytes_are_cut_and_how_lines_end_does_not_matter(cuts: list[int], end: bytes) -> None:
    text = b"\xef\xbb\xbfdata: {1}\n\n: a comment\nevent: error\ndata:{2\ndata: }\n\ndata: {3}\ndata: {4}\n\ndata: [DONE]\n\ndata: {5}\n\n"
    text = text.replace(b"\n", end)
    heard = Heard()
    for begin, until in pairwise([0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]):
        heard.events.feed(text[begin:until])
    assert heard.all == [(b"{1}", b""), (b"{2\n}", b"error"), (b"{3}", b""), (b"{4}", b"")]
    assert heard.events.done and not heard.events.unread and not heard.events.too_long


def test_an_event_that_its_reader_cannot_read_is_kept_and_those_after_it_are_heard() -> None:
    heard = Heard()
    heard.events.feed(b"data: {no\n\ndata: {1}\n\n")
    assert heard.events.unread == b"{no" and heard.all == [(b"{1}", b"")]


@pytest.mark.parametrize("text", [b"data: " + b"x" * 60, b"data: {0123456789\n" * 6], ids=["a line", "lines of one event"])
def test_an_event_is_bounded(text: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "MOST_EVENT_BYTES", 50)
    heard = Heard()
    heard.events.feed(text)
    assert heard.events.too_long


def test_what_the_reader_raises_comes_out() -> None:
    def hear(data: bytes, name: bytes) -> bool:
        raise LookupError(data)

    with pytest.raises(LookupError):
        Events(hear).feed(b"data: {}\n")
