"""uvicorn's HTTP/1.1 with a bound on what comes before a body: it takes request heads, and trailers, of any size."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from pdlab.real.api.errors import ApiError, encode

MOST_HEAD_BYTES = 64 << 10  # the request line, all headers, and trailers
LINGER_S = 1.0  # what comes after a refusal is thrown away for so long: to hang up at once could overtake the answer


class Protocol(HttpToolsProtocol):
    _heading = _completed = _refused = False  # a head is being read; one was completed by what has just come
    _raw_bytes = _named_bytes = 0  # of the head that is being read: as it came, as it was parsed

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        self._completed = False
        super().data_received(data)
        if self._heading and not self._completed:
            self._raw_bytes += len(data)
            if self._raw_bytes > MOST_HEAD_BYTES:
                self._refuse()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._heading, self._raw_bytes, self._named_bytes = True, 0, 0

    def on_url(self, url: bytes) -> None:
        self._named_bytes += len(url)
        if self._named_bytes > MOST_HEAD_BYTES:
            raise ValueError("the request line is too long")
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._named_bytes += len(name) + len(value) + 4
        if self._named_bytes > MOST_HEAD_BYTES:
            raise ValueError("the head is too long")  # ends the parsing
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._heading, self._completed = False, True
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        if self._named_bytes > MOST_HEAD_BYTES:
            self._refuse()
        elif not self._refused:
            super().send_400_response(msg)

    def _refuse(self) -> None:
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        error = ApiError(431, f"the request's head exceeds {MOST_HEAD_BYTES >> 10} KiB", code="head_too_long")
        body = encode(error.body())
        self.transport.write(
            b"HTTP/1.1 431 Request Header Fields Too Large\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\nConnection: close\r\n\r\n%b" % (len(body), body)
        )
        if self.transport.can_write_eof() and (self.cycle is None or self.cycle.response_complete):
            self.transport.write_eof()
        asyncio.get_running_loop().call_later(LINGER_S, self.transport.close)
