"""What the code writes into the reference is what it says today."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pdlab import Experiment, simulate
from pdlab.experiment.schema import schema
from pdlab.policies import load as load_policy
from tests.docs.generated import part
from tests.docs.pages import DOCS, PART, ROOT, name, pages
from tests.docs.test_prose import MOST_PARAGRAPH_WORDS

SUMMARY = (DOCS / "reference" / "summary.md").read_text(encoding="utf-8")
THERE = [(page, m[1], m[2]) for page in pages() for m in PART.finditer(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize(("page", "what", "text"), THERE, ids=[f"{name(page)}: {what}" for page, what, _ in THERE])
def test_parts_that_the_code_writes_are_true(page: Path, what: str, text: str) -> None:
    assert text == part(what), "python -m tests.docs.generated"


def test_every_mapping_of_the_experiment_file_has_its_table() -> None:
    tables = {what.split()[1] for _, what, _ in THERE if what.startswith("keys ")}
    assert tables == {"Experiment", *schema()["$defs"]}


def fields_of(heading: str) -> set[str]:
    """The names in the first column of the tables below a heading of the page about results."""
    level = heading.partition(" ")[0]
    section = re.split(rf"^#{{2,{len(level)}}} ", SUMMARY.split(f"{heading}\n")[1], flags=re.MULTILINE)[0].split("\n### ")[0]
    return set(re.findall(r"`([\w.]+)`", "".join(line.split(" | ")[0] for line in section.splitlines() if line.startswith("| `"))))


def test_the_fields_of_results_are_those_of_a_run() -> None:
    result = simulate(Experiment.load(ROOT / "experiments" / "quickstart.yaml").with_(**{"workload.requests": 60}))
    summary = result.summary
    top = {*summary} - {"slo", "window", "instances", "roles", "links", "bottleneck", "run"}
    assert fields_of("## summary.json") == {*top, "slo.ttft_s", "slo.tpot_s"}
    assert fields_of("### `window`") == {*summary["window"]}
    assert fields_of("### `instances`: one entry each") == {*summary["instances"][0]}
    assert fields_of("### `roles`: the same by role") == {*summary["roles"]["decode"]}
    assert fields_of("### `links`: one entry each") == {*summary["links"][0]}
    assert fields_of("### `bottleneck`") == {*summary["bottleneck"]}
    assert fields_of("### `run`") == {*summary["run"]}
    assert fields_of("## requests.parquet") == {*result.requests.columns}
    assert fields_of("## timeline.parquet") == {*result.timeline.columns}


def test_every_policy_has_a_line_that_says_when_it_wins() -> None:
    lines = re.findall(
        r"^\| `(\w+)` \| .+ \| .+ \|$", (DOCS / "reference" / "policies.md").read_text().split("## Each policy")[0], re.MULTILINE
    )
    assert sorted(lines) == load_policy.names()


@pytest.mark.parametrize("what", ["policies", "messages"])
def test_what_docstrings_say_comes_in_short_paragraphs(what: str) -> None:
    prose = [x for x in part(what).split("\n\n") if not x.startswith(("|", "#", "```"))]
    long = [f"{len(item.split())} words: {item[:60]}" for x in prose for item in x.split("\n") if len(item.split()) > MOST_PARAGRAPH_WORDS]
    assert not long, "\n".join(long)
