"""The launches in a script: which of its commands start what, and as what."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from pdlab.core.types import UsageError
from pdlab.experiment.imports import dynamo, fastdeploy, llumnix, sglang, stores, vllm, xllm
from pdlab.experiment.imports.programs import Dropped, Launch, Program, Setting, launch, started
from pdlab.experiment.imports.shell import QUIET, Script, ScriptMistake, ShellCommand

PROGRAMS: tuple[Program, ...] = (
    *xllm.PROGRAMS,
    *fastdeploy.PROGRAMS,
    *llumnix.PROGRAMS,
    *vllm.PROGRAMS,
    *sglang.PROGRAMS,
    *dynamo.PROGRAMS,
    *stores.PROGRAMS,
)
WRAPPERS = frozenset(("docker", "podman", "srun", "mpirun", "numactl", "taskset", "nice", "setsid", "stdbuf", "timeout", "uv", "conda"))
LOOPS = frozenset(("for", "while", "until", "if", "case", "function", "[", "[["))
BEGINS = re.compile(  # a line of a text that has no code blocks
    r"^\s*(\w+=\S*\s+)*(nohup\s+|sudo\s+)?(\S*/)?(python[\d.]*\s+-m\s+)?("
    + "|".join(re.escape(name) for program in PROGRAMS for name in program.names)
    + r")(\s|\\|$)"
)


@dataclass(slots=True)
class LaunchReading:
    """`dropped` are the flags of all launches that are not carried over, and the commands that start nothing known."""

    launches: list[Launch] = field(default_factory=list)
    followers: list[Launch] = field(default_factory=list)  # further ranks of these, on other nodes
    dropped: list[Dropped] = field(default_factory=list)
    mistakes: list[ScriptMistake] = field(default_factory=list)
    notes: list[ScriptMistake] = field(default_factory=list)  # what no command says, and pdlab needs

    def of(self, *kinds: str) -> list[Launch]:
        return [one for one in self.launches if one.program.kind in kinds]

    @property
    def instances(self) -> list[Launch]:
        return self.of("instance", "cluster")


def read(script: Script) -> LaunchReading:
    """Raises UsageError where a value cannot be, or nothing is launched."""
    reading = LaunchReading(mistakes=list(script.mistakes))
    for command in script.commands:
        found = launch(command, PROGRAMS) or _wrapped(command)
        if found is not None:
            reading.launches.append(found)
            reading.dropped.extend(found.dropped if found.program.kind != "client" else ())
            continue
        name, _ = started([word.text for word in command.words])
        if name in LOOPS:
            reading.dropped.append(Dropped(command.line, name, "", "conditions and loops are not followed: what is inside counts once"))
        elif name not in QUIET and not name.startswith(("-", "$")):
            reading.dropped.append(Dropped(command.line, name, "", "no launch command that pdlab import knows"))
    if not reading.instances and not reading.of("router"):
        known = ", ".join(dict.fromkeys(program.system for program in PROGRAMS if program.kind != "client"))
        raise UsageError(f"there is no launch command here; pdlab import knows those of {known}")
    _ranks(reading)
    _roles(reading)
    return reading


def _wrapped(command: ShellCommand) -> Launch | None:
    """What a command starts that is given another as its last words."""
    if started([word.text for word in command.words])[0] not in WRAPPERS:
        return None
    parts = (replace(command, words=command.words[at:]) for at in range(1, len(command.words)))
    return next((found for part in parts if (found := launch(part, PROGRAMS)) is not None), None)


def _ranks(reading: LaunchReading) -> None:
    """Of an engine on several nodes the others' commands start ranks, and no instance of their own. On one there is nobody to meet."""
    for one in reading.of("instance"):
        if one.number("nodes") > 1:
            if one.number("node_rank"):
                reading.launches.remove(one)
                reading.followers.append(one)
        elif "master" in one.settings:
            why = "its ranks are on one node, and meet by themselves"
            reading.dropped.append(Dropped(one.line_of("master"), one.flag_of("master"), one.text("master"), why))


def _roles(reading: LaunchReading) -> None:
    """Where a command leaves its role open, the others tell it: the proxy's ports, or that there are prefill instances."""
    prefill, decode = set(_ports(reading, "prefill_ports")), set(_ports(reading, "decode_ports"))
    prefills = any(one.get("role") == "prefill" for one in reading.instances)
    for one in reading.instances:
        open_ = one.get("role") == "both" or (one.program in dynamo.PROGRAMS and "role" not in one.settings)
        if open_:
            port = one.number("port")
            role = "prefill" if port in prefill else "decode" if port in decode or prefills else "mixed"
            one.settings["role"] = Setting(role, one.flag_of("role"), one.line_of("role"))
        if one.program is fastdeploy.API_SERVER and one.get("local_prefills") and "role" not in one.settings:
            one.settings["role"] = replace(one.settings["local_prefills"], value="decode")


def _ports(reading: LaunchReading, setting: str) -> Iterator[int]:
    for one in reading.of("router"):
        found = one.get(setting)
        if isinstance(found, tuple):
            yield from found


def placeholder(text: str) -> bool:
    """Does a document say so where a reader is to put something of their own?"""
    return re.search(r"xx\.xx|/?path/to/|<[^>]+>|^your[-_ ]", text, re.IGNORECASE) is not None


def ports_of(found: Launch, *names: str) -> Iterator[tuple[int, int, str]]:
    """(port, line, flag) of those settings."""
    for name in names:
        value = found.get(name)
        for port in value if isinstance(value, Sequence) and not isinstance(value, str) else (value,):
            if isinstance(port, int) and port > 0:
                yield port, found.line_of(name), found.flag_of(name)
