"""Trace files as text: plain, gzip, zstd, bzip2 or xz (told by their first bytes, not by their names), read as a stream; written plain,
as gzip or zstd.

A mistake in a file names the place: `trace.csv: line 7, column ContextTokens: ...`. A compressed stream that ends early is a mistake
too: zlib and zstandard are asked whether the last frame was whole, since neither says so by itself when read in pieces.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol

import zstandard

from pdlab.core.types import UsageError

Progress = Callable[[int, int], None]  # bytes of the file read, bytes in all

COMPRESSED = (".gz", ".zst")  # as files are written
PACKED = (*COMPRESSED, ".bz2", ".xz")  # as they are read
PARQUET = b"PAR1"
_GZIP, _ZSTD, _BZIP, _XZ = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zX"
_OTHERS = {b"PK\x03\x04": "a zip archive: unpack it", b"\xff\xfe": "UTF-16: save it as UTF-8", b"\xfe\xff": "UTF-16: save it as UTF-8"}
_CHUNK_BYTES = 1 << 16
_EARLY_END = "the compressed stream ends early: the file is truncated; copy or download it again"


class TextFile:
    """The lines of one file, counted. `line` is the number of the last one read, from 1; use it within `with`.

    Raises UsageError where the file can't be read, is not text, or its compression is damaged.
    """

    def __init__(self, path: Path, progress: Progress | None = None) -> None:
        self.path = path
        self.line = 0
        self.counted = "line"  # what `line` counts; of a file that is one JSON value, its entries
        try:
            self._raw = path.open("rb")
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}") from None
        self.magic = magic = self._raw.read(4)
        self._raw.seek(0)
        if other := next((what for begin, what in _OTHERS.items() if magic.startswith(begin)), None):
            self._raw.close()
            raise UsageError(f"{path}: this is {other}")
        chunks = _chunks(self._raw, progress)
        if magic.startswith(_GZIP):
            chunks = _inflated(chunks, lambda: zlib.decompressobj(wbits=31))
        elif magic == _ZSTD:
            chunks = _inflated(chunks, lambda: zstandard.ZstdDecompressor().decompressobj())
        elif magic.startswith(_BZIP):
            chunks = _inflated(chunks, bz2.BZ2Decompressor)
        elif magic == _XZ:
            chunks = _inflated(chunks, lzma.LZMADecompressor)
        self._text = io.TextIOWrapper(io.BufferedReader(_Stream(chunks), _CHUNK_BYTES), encoding="utf-8-sig", newline=None)

    def __enter__(self) -> TextFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._raw.close()

    def __iter__(self) -> Iterator[str]:
        """Every line, its end included."""
        try:
            for line in self._text:
                self.line += 1
                yield line
        except UnicodeDecodeError:
            raise UsageError(f"{self.path}: not UTF-8 text from about line {self.line + 1} on") from None
        except (_Damage, zlib.error, zstandard.ZstdError, lzma.LZMAError, EOFError, OSError) as error:
            raise UsageError(f"{self.path}: from about line {self.line + 1} on, {error}") from None

    def wrong(self, what: str, column: str | int | None = None) -> UsageError:
        """A mistake in the last line read. `column` is a name, or a position from 1 where there are no names."""
        place = f"{self.counted} {self.line}" + ("" if column is None else f", column {column}")
        return UsageError(f"{self.path}: {place}: {what}")


@contextmanager
def new_text_file(path: Path) -> Iterator[io.TextIOBase]:
    """A text file to write, compressed as the suffix says; it takes the place of `path` when the block ends well, else nothing changes."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with (
            partial.open("wb") as raw,
            _deflated(raw, path.suffix) as packed,
            io.TextIOWrapper(packed, encoding="utf-8", newline="") as text,
        ):
            yield text
        partial.replace(path)
    except OSError as error:
        raise UsageError(f"{path}: cannot write there ({error.strerror})") from None
    finally:
        partial.unlink(missing_ok=True)


class _Damage(Exception):
    """A compressed stream that is not whole."""


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


class _Stream(io.RawIOBase):
    """An iterator of bytes as a file."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]  # typeshed's Buffer needs Python 3.12
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size


def _chunks(raw: BinaryIO, progress: Progress | None) -> Iterator[bytes]:
    size = os.fstat(raw.fileno()).st_size
    while chunk := raw.read(_CHUNK_BYTES):
        if progress is not None:
            progress(raw.tell(), size)
        yield chunk


def _inflated(chunks: Iterator[bytes], start: Callable[[], _Decompressor]) -> Iterator[bytes]:
    """Decompress frame after frame; each has to be whole."""
    frame: _Decompressor | None = None
    for packed in chunks:
        while packed:
            frame = frame or start()
            yield frame.decompress(packed)
            packed = b""
            if frame.eof:
                packed, frame = frame.unused_data, None
    if frame is not None:
        raise _Damage(_EARLY_END)


@contextmanager
def _deflated(raw: BinaryIO, suffix: str) -> Iterator[BinaryIO]:
    """Bytes written here reach `raw` compressed; the same text makes the same file, since no time is stored."""
    if suffix == ".gz":
        with gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as packed:
            yield packed  # type: ignore[misc]  # a BinaryIO in all that TextIOWrapper asks of it
    elif suffix == ".zst":
        with zstandard.ZstdCompressor(level=10).stream_writer(raw, closefd=False) as packed:
            yield packed
    else:
        yield raw
