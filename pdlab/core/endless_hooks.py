"""An end to a policy's hook that does not return.

A thread looks once a second at where the deciding thread is. Where the same call of a hook is under way for ten looks, `Endless` is raised
in it, which the router turns into a mistake of the policy's. A hook is called as often as ever and costs as little: nothing is written down
when it begins. A hook in a debugger has all the time it wants.

In the main thread a signal carries the exception, which also wakes a hook that sleeps or waits for a lock. In another thread it comes with
the next bytecode. Neither reaches into a C function that keeps the interpreter to itself, as `sum(itertools.count())` does.
"""

from __future__ import annotations

import ctypes
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType, FrameType

from pdlab.core.blame import HOOK_S, Endless, hook_code
from pdlab.core.policy import HOOKS, Policy
from pdlab.core.types import UsageError

LOOK_S = 1.0
LOOKS = round(HOOK_S / LOOK_S)  # that see the same call, until it is cut off
_ASKED = (*HOOKS, *(hook.__name__ for hook in (Policy.observe, Policy.first, Policy.evict)))


@contextmanager
def watched(policy: Policy) -> Iterator[None]:
    """Whatever this thread asks the policy meanwhile. Raises UsageError where `Endless` met no router, the call being over by then."""
    watch = _Watch(policy, threading.get_ident())
    with watch.signalled():
        watch.start()
        try:
            yield
        except Endless:
            raise UsageError(f"policy {type(policy).__name__}: a hook of it took more than {HOOK_S:g} s") from None
        finally:
            watch.over.set()
            watch.join()


class _Watch(threading.Thread):
    def __init__(self, policy: Policy, ident: int) -> None:
        super().__init__(name="pdlab-watchdog", daemon=True)
        self.watched_ident = ident
        self.over = threading.Event()
        self.call: FrameType | None = None  # of a hook, as last seen
        self.hooks = _hooks(policy)
        self.by_signal = False

    def run(self) -> None:
        looks = 0
        while not self.over.wait(LOOK_S):
            call = self._under_way(sys._current_frames().get(self.watched_ident))
            looks = looks + 1 if call is not None and call is self.call else 0
            self.call = call
            if looks >= LOOKS:
                self._cut_off()

    def _under_way(self, frame: FrameType | None) -> FrameType | None:
        """The outermost call of a hook; None where there is none, or somebody debugs it."""
        found = None
        while frame is not None:
            if frame.f_trace is not None:
                return None
            if frame.f_code in self.hooks:
                found = frame
            frame = frame.f_back
        return found

    def _cut_off(self) -> None:
        if self.by_signal:
            signal.pthread_kill(self.watched_ident, signal.SIGALRM)
        else:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.watched_ident), ctypes.py_object(Endless))

    @contextmanager
    def signalled(self) -> Iterator[None]:
        """With SIGALRM at hand, where this is the main thread and nobody else has use for it."""
        main = threading.current_thread() is threading.main_thread()
        if not main or not hasattr(signal, "SIGALRM") or signal.getsignal(signal.SIGALRM) is not signal.SIG_DFL:
            yield
            return
        self.by_signal = True
        signal.signal(signal.SIGALRM, self._raise)
        try:
            yield
        finally:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        """Unless the call has returned since it was looked at."""
        call = self.call
        while frame is not None and frame is not call:
            frame = frame.f_back
        if frame is not None:
            raise Endless


def _hooks(policy: Policy) -> frozenset[CodeType]:
    """The functions that answer."""
    members = [policy, *getattr(policy, "members", {}).values()]
    codes = [hook_code(member, hook) for member in members for hook in _ASKED]
    return frozenset(code for code in codes if code is not None)
