"""Scripts as commands: what a shell would make of them, and where their author meant something else."""

from __future__ import annotations

import re

import pytest

from pdlab.experiment.imports.shell import Script, of_words, read, shown


def words(script: Script) -> list[list[str]]:
    return [[word.text for word in command.words] for command in script.commands]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("run --a 1\\\n  --b 2", [["run", "--a", "1", "--b", "2"]]),
        ("run --a 'x y' # why\nrun --b", [["run", "--a", "x y"], ["run", "--b"]]),
        ("run a; run b && run c &\nrun d > log 2>&1 &", [["run", "a"], ["run", "b"], ["run", "c"], ["run", "d"]]),
        ("run --n 2 > log", [["run", "--n", "2"]]),
        ("nohup sudo run a | tee log", [["run", "a"], ["tee", "log"]]),
        ("M=x\nrun $M ${M} ${N:-y} ${N-z}", [["run", "x", "x", "y", "z"]]),
        ('run --json \'{"a": 1,\n "b": 2}\' --c', [["run", "--json", '{"a": 1,\n "b": 2}', "--c"]]),
        ("run url#part", [["run", "url#part"]]),
        ("", []),
        ("c='run --a'\neval \"$c --b\"", [["run", "--a", "--b"]]),
        ("bash -c 'run a; run b'", [["run", "a"], ["run", "b"]]),
        ("cat <<EOF > x\nit's --a\nEOF\nrun b", [["cat"], ["run", "b"]]),
    ],
)
def test_commands_and_their_words(text: str, expected: list[list[str]]) -> None:
    script = read(text)
    assert [[re.sub(r"\s+", " ", word) for word in one] for one in words(script)] == [
        [re.sub(r"\s+", " ", word) for word in one] for one in expected
    ]
    assert not script.mistakes


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("run --a 1 \\\n --ttl 9000\n --role decode", 2, "a backslash is missing here, so a shell leaves --role out"),
        ("run --a=1\n--b=2", 1, "a backslash is missing"),
        ("run --ip=x \\ # the real one\n --role=decode", 1, "a comment after the backslash"),
        ("run --addr=x \\  \n --role=decode", 1, "blanks after the backslash"),
        ("run --a=1 \\\n # why\n --role=decode", 2, "a comment between continued lines"),
    ],
)
def test_what_ends_a_command_too_soon_is_told_and_read_as_meant(text: str, line: int, says: str) -> None:
    script = read(text)
    (mistake,) = script.mistakes
    assert (mistake.line, says in mistake.text) == (line, True), mistake
    assert len(script.commands) == 1
    assert words(script)[0][-1].startswith(("--role", "decode", "--b"))


def test_a_word_knows_its_line() -> None:
    (command,) = read("\nrun --a \\\n  --b \\\n  'c\nd' --e").commands
    assert [(word.text.strip(), word.line) for word in command.words] == [("run", 2), ("--a", 2), ("--b", 3), ("c \nd", 5), ("--e", 5)]


def test_variables_are_of_the_command_or_exported() -> None:
    script = read("export A=1\nB=2 run\nrun\nexport $(bash nics.sh gpu)\nrun\n", {"C": "3"})
    found = [{name: word.text for name, word in command.environment.items()} for command in script.commands]
    assert found == [{"A": "1", "B": "2"}, {"A": "1"}, {"A": "1", "$()": "bash nics.sh gpu"}]
    assert words(read("run $C $D", {"C": "3"})) == [["run", "3", "$D"]]
    assert "$D is set nowhere" in read("run $C $D", {"C": "3"}).mistakes[0].text
    assert not read("echo $D").mistakes


def test_words_that_a_shell_took_apart_already() -> None:
    script = of_words(["A=1", "run", "--x y", ";", "run", "b"])
    assert words(script) == [["run", "--x y"], ["run", "b"]]
    assert script.commands[0].environment["A"].text == "1" and not script.commands[1].environment
    (command,) = of_words(["run"], {"B": "2"}).commands
    assert command.environment["B"].text == "2"


def test_a_documents_commands_are_in_its_blocks_or_begin_like_one() -> None:
    fenced = "It's so:\n```bash\nrun --a \\\n  --b\n```\nrun no\n```json\n{}\n```\n"
    assert words(read(shown(fenced, re.compile("^run")))) == [["run", "--a", "--b"]]
    prose = "The server's flags\n   run --a \\\n   --b\nand it's done\nrunning on\n"
    assert words(read(shown(prose, re.compile(r"^\s*run ")))) == [["run", "--a", "--b"]]


def test_a_quote_that_never_ends_is_told() -> None:
    script = read("run 'a\nrun b \\\n  c")
    assert (script.mistakes[0].line, "cannot be read" in script.mistakes[0].text) == (1, True)
    assert words(script) == [["run", "b", "c"]]
