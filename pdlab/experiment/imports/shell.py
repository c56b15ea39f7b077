"""A shell script as commands: their words, each with its line, and the variables that are set for them.

Nothing is run. Variables are put in where the script, or the caller's environment, sets them; loops, functions and substitutions stay
as they are written. What a shell would read otherwise than its author meant is a `ScriptMistake`, and is read as meant.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

LONGEST_LINES = 200  # of one command
SEPARATORS = frozenset(";&|")
QUIET = frozenset(("cd", "mkdir", "echo", "sleep", "wait", "set", "source", ".", "unset", "ls", "cat", "date", "trap", "done", "fi", "git"))
PREFIXES = frozenset(("nohup", "sudo", "env", "exec", "time", "do", "then", "{"))
DEEPEST = 3  # commands within commands
_HERE = re.compile(r"<<-?\s*['\"]?(\w+)['\"]?")
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=")
_VARIABLE = re.compile(r"\$(?:\{(\w+)(?::?-([^}]*))?\}|(\w+))")
_DESCRIPTOR = re.compile(r"(?<=\s)\d(?=>)")  # of a redirection
_FENCE = re.compile(r"\s*(```|~~~)\s*(\w*)")
_NOT_SHELL = frozenset(("python", "py", "json", "yaml", "yml", "toml", "c", "cpp", "text", "console"))


@dataclass(frozen=True, slots=True)
class Word:
    text: str
    line: int


@dataclass(frozen=True, slots=True)
class ScriptMistake:
    """What is wrong in a line, and how it was read all the same. Line 0: of no line in particular."""

    line: int
    text: str


@dataclass(frozen=True, slots=True)
class ShellCommand:
    """`words` are the program's name and its arguments; `environment` has what the script exports or sets before them."""

    words: tuple[Word, ...]
    environment: Mapping[str, Word]

    @property
    def line(self) -> int:
        return self.words[0].line


@dataclass(slots=True)
class Script:
    """What `read` has made of a text."""

    commands: list[ShellCommand] = field(default_factory=list)
    mistakes: list[ScriptMistake] = field(default_factory=list)


def read(text: str, environ: Mapping[str, str] | None = None) -> Script:
    """The commands of a script. `environ` has the variables of whoever would run it."""
    reader = _Reader({name: Word(value, 0) for name, value in (environ or {}).items()})
    for logical in _logical_lines(text.splitlines(), reader.script.mistakes):
        reader.take(_tokens(logical, reader.script.mistakes))
    return reader.script


def of_words(words: Sequence[str], environ: Mapping[str, str] | None = None) -> Script:
    """Commands that a shell has taken apart already: they end at a word ; or && or &. They would be run here, with `environ`."""
    reader = _Reader({})
    reader.exported = {name: Word(value, 0) for name, value in (environ or {}).items()}
    reader.take([Word(word, 1) for word in words])
    return reader.script


class _Reader:
    """Variables as they stand after what was read so far."""

    def __init__(self, variables: dict[str, Word]) -> None:
        self.script = Script()
        self.variables, self.exported = variables, dict[str, Word]()

    def take(self, tokens: Sequence[Word], depth: int = 0) -> None:
        for words in _split(tokens):
            own, rest = _assignments(words, self.variables)
            if rest and rest[0].text == "export":
                own, rest = {**own, **_exports(rest[1:], self.variables)}, ()
                self.exported.update(own)
            if not rest:
                self.variables.update(own)
                self.exported.update({name: word for name, word in own.items() if name in self.exported})
                continue
            found = _expanded(rest, {**self.variables, **own}, self.script.mistakes)
            inner = _evaluated(found)
            if inner is None or depth > DEEPEST:
                self.script.commands.append(ShellCommand(found, {**self.exported, **own}))
            else:
                self.take(_tokens([inner], self.script.mistakes), depth + 1)


def _evaluated(words: Sequence[Word]) -> Word | None:
    """The text that the command has a shell read: of eval, and of bash -c."""
    texts = [word.text for word in words]
    at = 1 if texts[0] == "eval" else 2 if re.fullmatch(r"(\S*/)?(ba|z|da)?sh", texts[0]) and texts[1:2] in (["-c"], ["-lc"]) else 0
    if not at or len(words) <= at:
        return None
    return Word(" ".join(texts[at:]) if at == 1 else texts[at], words[0].line)


def shown(text: str, launches: re.Pattern[str]) -> str:
    """A document's shell blocks, every other line empty; where it has no blocks, the lines that begin with `launches` and those that
    continue them."""
    lines = text.splitlines()
    if any(_FENCE.match(line) for line in lines):
        return "\n".join(_fenced(lines))
    kept, inside = [], False
    for line in lines:
        inside = inside or launches.search(line) is not None
        kept.append(line if inside else "")
        inside = inside and (_continues(line) or _is_option(line))
    return "\n".join(kept)


def _fenced(lines: Sequence[str]) -> Iterator[str]:
    language: str | None = None
    for line in lines:
        fence = _FENCE.match(line)
        if fence is not None:
            language = None if language is not None else fence[2].lower()
            yield ""
        else:
            yield line if language is not None and language not in _NOT_SHELL else ""


# ---------------------------------------------------------------- lines


def _logical_lines(lines: Sequence[str], mistakes: list[ScriptMistake]) -> Iterator[list[Word]]:
    """Physical lines that make one command, each a Word of its text without the backslash; texts between << and their end are left out."""
    at = 0
    while at < len(lines):
        if not _without_comment(lines[at]).strip():
            at += 1
            continue
        parts = _logical(lines, at, mistakes)
        at += len(parts)
        for document in _HERE.findall(" ".join(part.text for part in parts)):
            at = next((end + 1 for end in range(at, len(lines)) if lines[end].strip() == document), at)
        yield parts


def _logical(lines: Sequence[str], begin: int, mistakes: list[ScriptMistake]) -> list[Word]:
    """The command that begins in that line. A quote goes on over lines, if it ends."""
    parts: list[Word] = []
    told: list[ScriptMistake] = []
    whole = 0  # lines, up to where the command would end but for an open quote
    for at in range(begin, min(len(lines), begin + LONGEST_LINES)):
        following = lines[at + 1] if at + 1 < len(lines) else ""
        text, goes_on = _part(lines[at], at + 1, following, bool(parts), told)
        parts.append(Word(text, at + 1))
        if not goes_on:
            whole = whole or len(parts)
            if not _open_quote(parts):
                whole = len(parts)
                break
    parts = parts[: whole or len(parts)]
    mistakes.extend(one for one in told if one.line <= parts[-1].line)
    return parts


def _part(line: str, number: int, following: str, inside: bool, mistakes: list[ScriptMistake]) -> tuple[str, bool]:
    """A line without its continuation, and whether it has one."""
    if found := re.fullmatch(r"(.*?)\\\s+#.*", line):
        mistakes.append(ScriptMistake(number, "a comment after the backslash ends the command there: it is read as going on"))
        return found[1], True
    if found := re.fullmatch(r"(.*)\\\s+", line):
        mistakes.append(ScriptMistake(number, "blanks after the backslash end the command there: it is read as going on"))
        return found[1], True
    if line.endswith("\\"):
        return line[:-1], True
    text = _without_comment(line)
    if inside and not text.strip():
        mistakes.append(ScriptMistake(number, "a comment between continued lines ends the command there: it is read as going on"))
        return "", _is_option(following)
    if text.strip() and _is_option(following) and not _ends(text) and (inside or not _is_option(line)):
        flag = following.split()[0].partition("=")[0]
        mistakes.append(ScriptMistake(number, f"a backslash is missing here, so a shell leaves {flag} out: it is read as one command"))
        return text, True
    return text, False


def _ends(text: str) -> bool:
    return text.rstrip().endswith((";", "&", "|"))


def _continues(line: str) -> bool:
    return re.search(r"\\\s*(#.*)?$", line) is not None


def _is_option(line: str) -> bool:
    return re.match(r"\s*--?[A-Za-z]", line) is not None


def _without_comment(line: str) -> str:
    for found in re.finditer(r"(?:^|(?<=\s))#", line):
        before = line[: found.start()]
        if before.count("'") % 2 == 0 and before.count('"') % 2 == 0:
            return before
    return line


def _open_quote(parts: Sequence[Word]) -> bool:
    try:
        shlex.split("\n".join(part.text for part in parts))
    except ValueError:
        return True
    return False


# ---------------------------------------------------------------- words


def _tokens(parts: Sequence[Word], mistakes: list[ScriptMistake]) -> list[Word]:
    text = _DESCRIPTOR.sub("", "".join(f"{part.text} \n" for part in parts))
    lexer = shlex.shlex(text, posix=True, punctuation_chars=";&|<>")
    lexer.whitespace_split, lexer.commenters = True, ""
    found: list[Word] = []
    try:
        while (token := lexer.get_token()) is not None:
            found.append(Word(token, parts[min(lexer.lineno, len(parts)) - 1].line))
    except ValueError as error:
        mistakes.append(ScriptMistake(parts[0].line, f"this cannot be read ({error}): it is left out"))
        return []
    return found


def _split(words: Sequence[Word]) -> Iterator[list[Word]]:
    """At what ends a command; redirections are left out."""
    part: list[Word] = []
    skip = False
    for word in words:
        if skip:
            skip = False
        elif word.text and set(word.text) <= set("<>&|") and set(word.text) & set("<>"):
            skip = True
        elif word.text and set(word.text) <= SEPARATORS:
            if part:
                yield part
            part = []
        else:
            part.append(word)
    if part:
        yield part


def _assignments(words: Sequence[Word], variables: Mapping[str, Word]) -> tuple[dict[str, Word], tuple[Word, ...]]:
    """Those before a command, and the command."""
    own: dict[str, Word] = {}
    for at, word in enumerate(words):
        if _ASSIGNMENT.match(word.text):
            name, _, value = word.text.partition("=")
            own[name] = Word(_put_in(value, variables)[0], word.line)
        elif word.text not in PREFIXES:
            return own, tuple(words[at:])
    return own, ()


def _exports(words: Sequence[Word], variables: Mapping[str, Word]) -> dict[str, Word]:
    """`export A=b C`, and what `export $(script)` would add under the name of the script."""
    found: dict[str, Word] = {}
    for word in words:
        name, equals, value = word.text.partition("=")
        if equals:
            found[name] = Word(_put_in(value, variables)[0], word.line)
        elif word.text in variables:
            found[word.text] = variables[word.text]
    whole = " ".join(word.text for word in words)
    if whole.startswith("$("):
        found["$()"] = Word(whole[2:].rstrip(")"), words[0].line)
    return found


def _expanded(words: Sequence[Word], variables: Mapping[str, Word], mistakes: list[ScriptMistake]) -> tuple[Word, ...]:
    found = []
    for word in words:
        text, unset = _put_in(word.text, variables)
        told = unset if words[0].text not in QUIET else []
        mistakes.extend(ScriptMistake(word.line, f"${name} is set nowhere in the script: it stays as it is written") for name in told)
        found.append(Word(text, word.line))
    return tuple(found)


def _put_in(text: str, variables: Mapping[str, Word]) -> tuple[str, list[str]]:
    unset: list[str] = []

    def value(found: re.Match[str]) -> str:
        name = found[1] or found[3]
        if name in variables and variables[name].text:
            return variables[name].text
        if found[2] is not None:
            return found[2]
        unset.append(name)
        return found[0]

    return _VARIABLE.sub(value, text), unset
