"""`python -m pdlab.real.engine.grammar_check`: compiles the grammars that clients send, before any engine sees them.

A grammar can take a compiler seconds and gigabytes, and can overflow its stack. So it is tried in this process first, with bounds on each,
and whoever asks takes its death for a no. Length-prefixed msgpack on stdin, a Vocabulary first, then grammars; answered by lines of text.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from typing import IO, TypeVar

import msgspec

from pdlab.real.engine.grammar import GrammarError, Grammars
from pdlab.real.engine.messages import StructuredOutputs, Vocabulary

CPU_S = 1.0  # for one grammar
MEMORY_BYTES = 512 << 20  # beside what the vocabulary takes
STACK_BYTES = 4 << 20
T = TypeVar("T")
VOCABULARY, ASKED = msgspec.msgpack.Decoder(Vocabulary), msgspec.msgpack.Decoder(StructuredOutputs)


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the server decides
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=serve, args=(sys.stdin.buffer, sys.stdout.buffer))
    thread.start()
    thread.join()
    return 0


def serve(asked: IO[bytes], answers: IO[bytes]) -> None:
    """Until the other end closes."""
    vocabulary = _next(asked, VOCABULARY)
    if vocabulary is None:
        return
    trouble = ""
    try:
        grammars: Grammars | None = Grammars(vocabulary)
    except GrammarError as error:
        grammars, trouble = None, str(error)
    _bound_memory()
    while (structured := _next(asked, ASKED)) is not None:
        reason = trouble
        if grammars is not None:
            signal.setitimer(signal.ITIMER_PROF, CPU_S)  # whose signal ends the process
            try:
                grammars.compile(structured)
            except GrammarError as error:
                reason = str(error)
            except MemoryError:
                reason = "it takes too much memory to compile"
            signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(reason.encode(errors="replace") + b"\n")
        answers.flush()


def _bound_memory() -> None:
    """Where the system can."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        with open("/proc/self/statm") as file:
            taken = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY_BYTES, taken + MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _next(asked: IO[bytes], decoder: msgspec.msgpack.Decoder[T]) -> T | None:
    head = asked.read(4)
    if len(head) < 4:
        return None
    return decoder.decode(asked.read(int.from_bytes(head, "little")))


if __name__ == "__main__":
    sys.exit(main())
