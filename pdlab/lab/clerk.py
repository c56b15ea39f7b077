"""Reads submissions, each in a process that has bounded time and memory."""

from __future__ import annotations

import resource
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext

from pdlab.lab.bounded import BoundedProcess
from pdlab.lab.submission import LineMistake, Submission, SubmissionReading, read

READ_S = 30.0
READ_BYTES = 4 << 30  # of address space


def read_bounded(context: ForkServerContext, submission: Submission, within_s: float = READ_S) -> SubmissionReading:
    """Whatever a submission does to its reader is a mistake of the submission's."""
    reader = BoundedProcess(context, _read, submission)
    try:
        if not reader.pipe.poll(within_s):
            return _refused(f"it was not read within {within_s:g} s; write a smaller one")
        found: SubmissionReading = reader.pipe.recv()
        return found
    except (EOFError, OSError):
        return _refused(f"its reader {reader.how_it_ended()}; write a smaller one")
    finally:
        reader.kill()


def _refused(why: str) -> SubmissionReading:
    return SubmissionReading(mistakes=(LineMistake(why),))


def _read(pipe: Connection, submission: Submission) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (READ_BYTES, READ_BYTES))
    try:
        pipe.send(read(submission))
    except MemoryError:
        pipe.send(_refused("reading it takes too much memory; write a smaller one"))
    except Exception as error:  # a policy's own, which is not the lab's
        pipe.send(_refused(f"{type(error).__name__}: {error}"))
