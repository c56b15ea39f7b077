"""Whose mistake it was in a policy: its class, and the file and line where it happened.

The line is of the policy's own code: in a traceback the last that is neither the router's nor a library's; of an answer that cannot be
carried out, where the hook begins.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Collection, Iterator
from types import CodeType, TracebackType

from pdlab.core.policy import Policy

HOOK_S = 10.0
GENERATED = "<string>"  # where dataclasses write their functions
_LIBRARIES = tuple(f"{path}{os.sep}" for path in dict.fromkeys(sysconfig.get_paths()[key] for key in ("stdlib", "purelib", "platlib")))


class Endless(BaseException):
    """Raised in a hook that has not returned for `HOOK_S`. No Exception: a policy that catches those would go on for ever."""


MISTAKES = (Exception, Endless, SystemExit)  # of a policy's, whatever hook raises them


def decider(policy: Policy, hook: str) -> Policy:
    """Who answers it: of a composed policy, a member."""
    owner = getattr(getattr(policy, hook), "__self__", policy)
    return owner if isinstance(owner, Policy) else policy


def hook_code(policy: Policy, hook: str) -> CodeType | None:
    """Of the function behind it, where it is one."""
    function = getattr(policy, hook)
    return getattr(getattr(function, "__func__", function), "__code__", None)


def culprit(policy: Policy, hook: str, error: BaseException | None) -> tuple[str, str]:
    """("mine.py:12", "Mine"): where in the policy's code an error was raised, and in whose; without one, where its hook begins."""
    owner = decider(policy, hook)
    place = ""
    for own, filename, line in _frames(error.__traceback__ if error is not None else None):
        if isinstance(own, Policy):
            owner = own
        if filename:
            place = f"{shown(filename)}:{line}"
    if not place and (code := hook_code(policy, hook)) is not None:
        place = f"{shown(code.co_filename)}:{code.co_firstlineno}"
    return place, type(owner).__name__


def blamed(policy: Policy, hook: str, error: BaseException | str) -> tuple[str, str]:
    """What is said before a mistake's circumstances, and after: "mine.py:12: policy Mine.dispatch", "raised KeyError: 3"."""
    place, name = culprit(policy, hook, None if isinstance(error, str) else error)
    if isinstance(error, str):
        what = error
    elif isinstance(error, Endless):
        what = f"does not return: it was cut off after {HOOK_S:g} s"
    else:
        what = f"raised {type(error).__name__}: {error}"
    return f"{place}: policy {name}.{hook}" if place else f"policy {name}.{hook}", what


def within(error: BaseException, modules: Collection[str]) -> str:
    """ "mine.py:12: ", the last line of these modules that a traceback has; empty where it has none."""
    place, traceback = "", error.__traceback__
    while traceback is not None:
        code = traceback.tb_frame.f_code
        if traceback.tb_frame.f_globals.get("__name__") in modules and code.co_filename != GENERATED:
            place = f"{shown(code.co_filename)}:{traceback.tb_lineno}: "
        traceback = traceback.tb_next
    return place


def shown(filename: str) -> str:
    """From the working folder, where it lies below it."""
    if not os.path.isabs(filename):
        return filename
    near = os.path.relpath(filename)
    return filename if near.startswith(os.pardir) else near


def _frames(traceback: TracebackType | None) -> Iterator[tuple[object, str, int]]:
    """Each frame's `self`; and its file and line, the file empty where it is the router's or a library's."""
    while traceback is not None:
        frame, line = traceback.tb_frame, traceback.tb_lineno
        own, module = frame.f_locals.get("self"), str(frame.f_globals.get("__name__", ""))
        theirs = isinstance(own, Policy) and module in {c.__module__ for c in type(own).__mro__ if c is not Policy}
        filename = frame.f_code.co_filename
        yield own, filename if filename != GENERATED and (theirs or not _foreign(module, filename)) else "", line
        traceback = traceback.tb_next


def _foreign(module: str, filename: str) -> bool:
    ours = module.startswith("pdlab.") and not module.startswith("pdlab.policies.")
    return ours or filename.startswith(("<", *_LIBRARIES))
