"""What somebody submits, and how it is read: into an order, or into mistakes beside their lines.

Reading builds the policy, which may be a stranger's code, and expands aliases, which may be a bomb; so it happens in a process of its own
that has bounded time and memory, `pdlab.lab.clerk`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import yaml

from pdlab.core.types import UsageError
from pdlab.cost.measurements import of_models, read_rows
from pdlab.experiment.experiment import Experiment
from pdlab.experiment.yaml import compose, overridden, read_mapping
from pdlab.lab.options import read_options
from pdlab.lab.store import JobKind, JobOrder
from pdlab.results.comparison import policy_words
from pdlab.search.grid import Grid
from pdlab.search.identity import RunHashes, code_hash, texts
from pdlab.search.plan import PlanQuestion
from pdlab.search.sweep import plan_sweep

SOURCE = "experiment"
MOST_NODES = 100_000  # of a file whose aliases are written out
MOST_SEEDS = 1000
MOST_TAGS = 32
TAG = re.compile(r"[\w .:/+@-]{1,64}")
_LINE = re.compile(r"line (\d+), column")
_DIGITS = 16


@dataclass(frozen=True, slots=True)
class Submission:
    """`experiment` is a file's text, or its mapping; `options` are those of the kind. Paths are names in `base_dir`, the folder of
    uploads, and of a policy's file only where `allow_code` says so."""

    kind: JobKind
    experiment: str | Mapping[str, Any]
    base_dir: Path
    seeds: int = 1
    overrides: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    allow_code: bool = False


@dataclass(frozen=True, slots=True)
class LineMistake:
    """`line` counts from 1; None where it is of no line. `path` is what `--set` takes."""

    text: str
    path: str = ""
    line: int | None = None


@dataclass(frozen=True, slots=True)
class SubmissionReading:
    """An order, or why there is none. `doubts` are lines that a person should see."""

    order: JobOrder | None = None
    mistakes: tuple[LineMistake, ...] = ()
    doubts: tuple[str, ...] = ()
    resolved: str = ""


def check_tags(tags: Sequence[str]) -> tuple[str, ...]:
    """Raises UsageError."""
    if len(tags) > MOST_TAGS:
        raise UsageError(f"tags: {len(tags)} are more than {MOST_TAGS}; give fewer")
    for tag in tags:
        if not TAG.fullmatch(tag):
            raise UsageError(f"tags: {tag[:80]!r} is no tag; take up to 64 letters, digits, spaces and . : / + @ - _")
    return tuple(dict.fromkeys(tags))


def read(submission: Submission) -> SubmissionReading:
    """Never raises for what is submitted."""
    text = submission.experiment if isinstance(submission.experiment, str) else ""
    try:
        options = read_options(submission.kind, submission.options)
        if submission.kind is JobKind.BOARD:
            return SubmissionReading(_board(submission, options))
        experiment = parse(submission)
        check_question(submission.kind, experiment, submission.seeds, options)
        order = _order(submission, experiment, options)
    except UsageError as error:
        return SubmissionReading(mistakes=tuple(_mistake(line, text) for line in str(error).splitlines()))
    said = [line for line in (experiment.ignored, *experiment.doubts) if line]
    return SubmissionReading(order, doubts=tuple(said), resolved=_shown_yaml(experiment))


def parse(submission: Submission) -> Experiment:
    """Raises UsageError with a line for each mistake."""
    if isinstance(submission.experiment, str):
        _check_bomb(submission.experiment)
        mapping = read_mapping(submission.experiment, SOURCE)
    else:
        mapping = dict(submission.experiment)
    mapping = overridden(mapping, submission.overrides)
    check_confined(mapping, submission.allow_code)
    return Experiment.parse({"name": SOURCE, **mapping, "base_dir": submission.base_dir}, SOURCE)


def check_confined(mapping: Mapping[str, Any], allow_code: bool, source: str = SOURCE) -> None:
    """A stranger's file names no path of this machine but those that were uploaded, and code only where that is allowed. Raises
    UsageError."""
    if "base_dir" in mapping:
        raise UsageError(f"{source}: base_dir: a lab has a folder of its own for files; upload them, and name them")
    for text in texts({key: value for key, value in mapping.items() if key != "name"}):
        for path in (PurePosixPath(text), PureWindowsPath(text)):
            if path.is_absolute() or ".." in path.parts:
                raise UsageError(f"{source}: {text[:80]!r} is a path outside of the lab's uploads; upload the file, and give its name")
        if not allow_code and (text.endswith(".py") or ".py:" in text):
            raise UsageError(f"{source}: {text[:80]!r} is a policy's code, which this lab does not run; start it with --allow-code")


def _check_bomb(text: str) -> None:
    """Aliases of aliases make a small file a large experiment. Raises UsageError."""
    try:
        root = compose(text)
    except (yaml.YAMLError, RecursionError):
        return  # which is told where it is read
    if root is not None and _nodes(root, {}, ()) > MOST_NODES:
        raise UsageError(f"{SOURCE}: its aliases written out are more than {MOST_NODES:,} values; write a smaller one")


def _nodes(node: yaml.Node, known: dict[int, int], above: tuple[int, ...]) -> int:
    if id(node) in above:
        raise UsageError(f"{SOURCE}: an alias names what it is within; write it out")
    if id(node) not in known:
        inner = node.value if isinstance(node.value, list) else []
        parts = [part for one in inner for part in (one if isinstance(one, tuple) else (one,))]
        known[id(node)] = 1 + sum(_nodes(part, known, (*above, id(node))) for part in parts)
    return known[id(node)]


def check_question(kind: JobKind, experiment: Experiment, seeds: int, options: Mapping[str, Any]) -> None:
    """What is asked of the experiment, so far as that is known without running it. Raises UsageError."""
    if not 1 <= seeds <= MOST_SEEDS:
        raise UsageError(f"seeds {seeds}: write 1 to {MOST_SEEDS:,}")
    if kind is JobKind.PLAN:
        question(seeds, options).check()
    elif kind is JobKind.SWEEP:
        plan_sweep(experiment, Grid.read(options["grid"]), seeds)
    elif kind is JobKind.TUNING:
        spaces = import_module("pdlab.search.tune_space")
        spaces.TuneSpace.read(options["policy"] or spaces.named_policy(experiment), options["params"], experiment.base_dir)


def question(seeds: int, options: Mapping[str, Any]) -> PlanQuestion:
    named = {name: options[name] for name in ("gpus", "rate", "objective", "requests")}
    return PlanQuestion(**named, usd_per_h=options["budget"], lost=options["failures"], seeds=seeds)


def _board(submission: Submission, options: Mapping[str, Any]) -> JobOrder:
    """Raises UsageError where the rows are no upload, or none of ours."""
    rows = str(options["rows"])
    check_confined({"rows": rows}, submission.allow_code)
    path = submission.base_dir / rows
    measured = of_models(read_rows(path)[0], options["models"])
    if not measured:
        raise UsageError(f"measurements {rows}: no row can be simulated")
    of = [hashlib.sha256(path.read_bytes()).hexdigest(), options["models"], code_hash()]
    id = hashlib.sha256(json.dumps(of).encode()).hexdigest()[:_DIGITS]
    return JobOrder(id, JobKind.BOARD, path.stem, "", ", ".join(options["models"]), 1, {"seeds": 1, "options": options})


def _order(submission: Submission, experiment: Experiment, options: Mapping[str, Any]) -> JobOrder:
    asked = {
        "experiment": experiment.model_dump(mode="json", exclude_unset=True, exclude={"base_dir"}),
        "seeds": submission.seeds,
        "options": dict(options),
    }
    whole = RunHashes().of(experiment)
    if submission.kind is not JobKind.EXPERIMENT or submission.seeds > 1:
        of = [whole, str(submission.kind), submission.seeds, asked["options"]]
        whole = hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:_DIGITS]
    name, policy = experiment.name, policy_words(experiment.policy)
    return JobOrder(whole, submission.kind, name, policy, experiment.model, submission.seeds, asked)


def _mistake(line: str, text: str) -> LineMistake:
    words = line.removeprefix(f"{SOURCE}: ")
    if (marked := _LINE.search(words)) is not None:
        return LineMistake(words, line=int(marked[1]))
    path = words.partition(":")[0]
    if not re.fullmatch(r"\w+(\.[\w-]+)*", path):
        return LineMistake(words)
    return LineMistake(words, path, _line_of(path.split("."), text))


def _line_of(path: Sequence[str], text: str) -> int | None:
    """Of the nearest there is: where a key is missing, its mapping's."""
    try:
        node = compose(text) if text else None
    except yaml.YAMLError:
        return None
    line = None
    for part in path:
        found = next(_entries(node, part), None)
        if found is None:
            break
        mark, node = found
        line = mark.line + 1
    return line


def _entries(node: yaml.Node | None, part: str) -> Iterator[tuple[Any, yaml.Node]]:
    if isinstance(node, yaml.MappingNode):
        yield from ((key.start_mark, value) for key, value in node.value if key.value == part)
    elif isinstance(node, yaml.SequenceNode) and part.isdecimal() and int(part) < len(node.value):
        yield node.value[int(part)].start_mark, node.value[int(part)]


def _shown_yaml(experiment: Experiment) -> str:
    """Resolved, without the folder of this machine."""
    plain = {key: value for key, value in experiment.resolved().items() if key != "base_dir"}
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=110)


def plain(reading: SubmissionReading) -> dict[str, Any]:
    return {"mistakes": [asdict(one) for one in reading.mistakes], "doubts": list(reading.doubts), "resolved": reading.resolved}
