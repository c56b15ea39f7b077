"""What the words of a launch command mean: a `Program` has a meaning for each flag and variable that it knows, and `launch` reads a command
by it. Underscores and dashes in flags are alike; so are `--flag value` and `--flag=value`.

A flag either sets one of the settings that `deployment_of` writes, or is left out for a reason that is told. One that the program's
table does not have is left out, too, and said to be unknown.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pdlab.core.types import UsageError
from pdlab.experiment.imports.shell import ShellCommand, Word

Kind = Literal["instance", "router", "store", "client", "cluster"]
TRUE, FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")
UNKNOWN = "pdlab import does not know it"


@dataclass(frozen=True, slots=True)
class Sets:
    """The flag sets `setting` to what `read` makes of its value; with `const` it needs none, and has it unless it is said to be false.
    With `many` it has all words up to the next flag, and may be there several times. With `why` the setting only tells something of the
    whole, and the flag itself is left out for that reason."""

    setting: str
    read: Callable[[str], object] = str
    const: object = None
    why: str = ""
    many: bool = False


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Why nothing of pdlab comes of the flag. A `switch` takes no value."""

    why: str
    switch: bool = False


Meaning = Sets | LeftOut


@dataclass(frozen=True, slots=True)
class Program:
    """`names`: how a command begins that starts it, without paths. `defaults` are its own where no flag says otherwise, as far as they
    matter to what is served. `positional` is the setting of a word that belongs to no flag."""

    system: str
    kind: Kind
    names: tuple[str, ...]
    flags: Mapping[str, Meaning]
    variables: Mapping[str, Meaning] = field(default_factory=dict)
    defaults: Mapping[str, object] = field(default_factory=dict)
    positional: str = ""


@dataclass(frozen=True, slots=True)
class Setting:
    value: object
    flag: str
    line: int


@dataclass(frozen=True, slots=True)
class Dropped:
    """A flag, or a variable, with its value, that is not carried over."""

    line: int
    flag: str
    value: str
    why: str

    def __str__(self) -> str:
        return f"{self.flag}{' ' * bool(self.value)}{self.value}: {self.why}"


@dataclass(slots=True)
class Launch:
    """One process that a command starts. `settings` by name; those of the program's own defaults have line 0."""

    program: Program
    line: int
    settings: dict[str, Setting] = field(default_factory=dict)
    dropped: list[Dropped] = field(default_factory=list)

    def get(self, setting: str) -> object:
        found = self.settings.get(setting)
        return found.value if found is not None else self.program.defaults.get(setting)

    def text(self, setting: str) -> str:
        found = self.get(setting)
        return "" if found is None else str(found)

    def number(self, setting: str) -> int:
        """0 where it is not set."""
        found = self.get(setting)
        return found if isinstance(found, int) else 0

    def line_of(self, setting: str) -> int:
        found = self.settings.get(setting)
        return found.line if found is not None else self.line

    def flag_of(self, setting: str) -> str:
        found = self.settings.get(setting)
        return found.flag if found is not None else setting


# ---------------------------------------------------------------- values


def whole(text: str) -> int:
    if not re.fullmatch(r"[+-]?\d+", text.strip()):
        raise ValueError("is no whole number")
    return int(text)


def share(text: str) -> float:
    found = float(text)
    if not 0.0 < found <= 1.0:
        raise ValueError("is no share between 0 and 1")
    return found


def seconds(text: str) -> float:
    found = float(text)
    if not found > 0.0:
        raise ValueError("is no time above 0")
    return found


def yes(text: str) -> bool:
    if text.strip().lower() in TRUE:
        return True
    if text.strip().lower() in FALSE:
        return False
    raise ValueError("is neither true nor false")


def no(text: str) -> bool:
    return not yes(text)


def one_of(**meanings: object) -> Callable[[str], object]:
    """By its lower-case name, dashes as underscores. Raises ValueError."""

    def read(text: str) -> object:
        name = text.strip().lower().replace("-", "_")
        if name not in meanings:
            raise ValueError(f"is not one of {', '.join(meanings)}")
        return meanings[name]

    return read


kv_cache_dtype = one_of(auto="auto", fp8="fp8", fp8_e4m3="fp8", bfloat16="bfloat16", bf16="bfloat16", float16="float16")


def numbers(text: str) -> tuple[int, ...]:
    return tuple(whole(part) for part in re.split(r"[,\s]+", text.strip("[] \"'")) if part)


def words(text: str) -> tuple[str, ...]:
    return tuple(part for part in re.split(r"[,\s]+", text.strip()) if part)


# ---------------------------------------------------------------- a command


def launch(command: ShellCommand, programs: Sequence[Program]) -> Launch | None:
    """What the command starts; None where it is none of the programs. Raises UsageError for a value that cannot be."""
    texts = [word.text for word in command.words]
    name, arguments = started(texts)
    program = next((one for one in programs if name in one.names), None)
    if program is None and len(texts) > arguments:
        name, arguments = f"{name} {texts[arguments]}", arguments + 1
        program = next((one for one in programs if name in one.names), None)
    if program is None:
        return None
    found = Launch(program, command.line)
    _read_variables(found, command.environment)
    _read_flags(found, command.words[arguments:])
    return found


def started(texts: Sequence[str]) -> tuple[str, int]:
    """The program that a command's words start, and how many of them name it."""
    first = texts[0].rsplit("/", 1)[-1]
    if re.fullmatch(r"python[\d.]*", first) and len(texts) > 1:
        at = next((n for n, text in enumerate(texts) if n and (text == "-m" or not text.startswith("-"))), 1)
        if texts[at] == "-m" and len(texts) > at + 1:
            return texts[at + 1], at + 2
        if texts[at].endswith(".py"):
            return texts[at].rsplit("/", 1)[-1], at + 1
    return first, 1


def _read_variables(found: Launch, environment: Mapping[str, Word]) -> None:
    for name, word in environment.items():
        meaning = found.program.variables.get(name)
        if meaning is not None:
            _take(found, meaning, name, word.text, word.line)


def _read_flags(found: Launch, arguments: Sequence[Word]) -> None:
    at = 0
    while at < len(arguments):
        word = arguments[at]
        at += 1
        if not re.match(r"--?[A-Za-z]", word.text):
            _positional(found, word)
            continue
        spelled, equals, value = word.text.partition("=")
        flag, meaning, negated = _meaning(found.program, spelled)
        if negated:
            value, equals = "false", "="
        elif not equals:
            taken = _values(arguments[at:], meaning)
            value, at = " ".join(one.text for one in taken), at + len(taken)
        if meaning is None:
            found.dropped.append(Dropped(word.line, spelled, value, UNKNOWN))
        else:
            _take(found, meaning, flag, value, word.line)


def _meaning(program: Program, spelled: str) -> tuple[str, Meaning | None, bool]:
    """The flag with dashes, what it means, and whether it is spelled as its contrary (--no-flag, gflags' --noflag)."""
    flag = "-" * (len(spelled) - len(spelled.lstrip("-"))) + spelled.lstrip("-").replace("_", "-")
    if flag in program.flags:
        return flag, program.flags[flag], False
    for prefix in ("--no-", "--no"):
        plain = f"--{flag.removeprefix(prefix)}"
        meaning = program.flags.get(plain)
        if flag.startswith(prefix) and isinstance(meaning, Sets) and meaning.const is not None:
            return spelled, meaning, True
    return flag, None, False


def _values(rest: Sequence[Word], meaning: Meaning | None) -> list[Word]:
    """The words after a flag that are its value."""
    if not rest or re.match(r"--?[A-Za-z]", rest[0].text) or (isinstance(meaning, LeftOut) and meaning.switch):
        return []
    if isinstance(meaning, Sets) and meaning.const is not None:
        return list(rest[:1]) if rest[0].text.lower() in (*TRUE, *FALSE) else []
    if isinstance(meaning, Sets) and meaning.many:
        return [rest[at] for at in range(next((n for n, one in enumerate(rest) if one.text.startswith("--")), len(rest)))]
    return list(rest[:1])


def _positional(found: Launch, word: Word) -> None:
    if found.program.positional and found.program.positional not in found.settings:
        found.settings[found.program.positional] = Setting(word.text, word.text, word.line)
    else:
        found.dropped.append(Dropped(word.line, word.text, "", "it belongs to no flag"))


def _take(found: Launch, meaning: Meaning, flag: str, value: str, line: int) -> None:
    if isinstance(meaning, LeftOut):
        found.dropped.append(Dropped(line, flag, value, meaning.why))
        return
    if not value and meaning.const is None:
        raise UsageError(f"line {line}: {flag} needs a value")
    try:
        taken = meaning.read(value) if meaning.const is None else _const(meaning.const, value)
    except ValueError as error:
        raise UsageError(f"line {line}: {flag} {value!r} {error}") from None
    before = found.settings.get(meaning.setting)
    if before is not None and meaning.many and isinstance(taken, tuple) and isinstance(before.value, tuple):
        taken = before.value + taken
    elif before is not None and before.flag == flag and before.value != taken:
        found.dropped.append(Dropped(before.line, flag, str(before.value), "a later one replaces it"))
    if meaning.why:
        found.dropped.append(Dropped(line, flag, value, meaning.why))
    if taken is not None:
        found.settings[meaning.setting] = Setting(taken, flag, line)


def _const(const: object, value: str) -> object:
    """Of a flag that needs no value; None where it is said not to hold, and has no contrary."""
    if not value or yes(value):
        return const
    return not const if isinstance(const, bool) else None
