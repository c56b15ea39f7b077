"""A file of another kind than the command reads: one line that says what it is, and for which command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pdlab.cli.main import main

ROOT = Path(__file__).parents[2]
QUICKSTART = (ROOT / "experiments" / "quickstart.yaml").read_text(encoding="utf-8")
TWO_WORLDS = (ROOT / "experiments" / "two_worlds.yaml").read_text(encoding="utf-8")
SUMMARY = json.dumps({"requests": 3, "completed": 3, "failed": 0, "ttft_s": {"mean": 0.1}, "run": {}})
LOG = '{"pdlab": "0.1.0", "seed": 1, "policy": "random", "policy_hash": "x", "hash_tokens": 0, "experiment": {}}\n[0.0, {}, []]\n'
TRACE = '{"timestamp": 0, "input_length": 10, "output_length": 5}\n{"timestamp": 9, "input_length": 10, "output_length": 5}\n'
CONFIG = json.dumps({"model_type": "llama", "hidden_size": 64})
PROFILE = json.dumps({"schema_version": 5, "name": "x", "machine": {}, "model": {}, "engine": {}, "steps": {}})

FILES = {
    "e.yaml": (QUICKSTART, "an experiment"),
    "w.yaml": (TWO_WORLDS, "a file of layouts, policies and rates"),
    "summary.json": (SUMMARY, "the summary of a run"),
    "l.jsonl": (LOG, "an event log"),
    "t.jsonl": (TRACE, "a trace"),
    "t.csv": ("arrival_s,prompt_tokens,output_tokens\n0,1,1\n", "a trace"),
    "config.json": (CONFIG, "a model's config.json"),
    "profile.json": (PROFILE, "a profile of pdlab calibrate"),
    "report.html": ("<html>", "a page"),
    "m.gguf": ("GGUF", "a file of weights"),
    "p.py": ("class Mine: pass\n", "a policy"),
}
READ_BY = {
    "e.yaml": "pdlab sim ",
    "w.yaml": "pdlab validate ",
    "summary.json": "experiment.yaml",
    "l.jsonl": "pdlab replay ",
    "t.jsonl": "pdlab trace stats ",
    "config.json": "pdlab models show ",
    "profile.json": "hardware: ",
    "m.gguf": "pdlab serve --model ",
}
COMMANDS = {
    "an experiment": (["sim", "{}"], ["sweep", "{}", "--grid", "workload.rate=1,2"], ["bench", "{}"], ["serve", "{}"]),
    "a file of layouts, policies and rates": (["validate", "{}"],),
    "an event log": (["replay", "{}"],),
    "a trace": (["trace", "stats", "{}"],),
    "a model's config.json": (["models", "show", "{}"],),
}
CASES = [
    (command, name)
    for wanted, commands in COMMANDS.items()
    for command in commands
    for name, (_, what) in FILES.items()
    if what != wanted
    and not (command[0] == "serve" and name in ("m.gguf", "config.json"))  # which it serves
    and not (command[0] in ("trace", "models") and name in ("report.html", "m.gguf", "p.py", "t.csv"))  # said in their own words
]


@pytest.mark.parametrize(("command", "name"), CASES, ids=lambda part: part if isinstance(part, str) else "-".join(part[:2]))
def test_the_line_says_what_it_is_and_who_reads_it(
    command: list[str], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, what = FILES[name]
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(SystemExit) as exit:
        main([word.format(tmp_path / name) for word in command])
    said = capsys.readouterr().err.strip()
    assert exit.value.code == 2
    assert len(said.splitlines()) == 1, said
    if command[0] == "models" and not name.endswith(".json"):
        return  # a name of the catalogue is wanted first
    assert f"{tmp_path / name} is {what}, not " in said
    assert READ_BY.get(name, "") in said


@pytest.mark.parametrize("key", ["cluster.instances.0.hardware", "cost.table", "workload.source", "model"])
def test_a_file_that_an_experiment_names_is_told_the_same_way(key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "e.yaml").write_text(QUICKSTART, encoding="utf-8")
    (tmp_path / "summary.json").write_text(SUMMARY, encoding="utf-8")
    with pytest.raises(SystemExit):
        main(["sim", str(tmp_path / "e.yaml"), "--set", f"{key}={tmp_path / 'summary.json'}"])
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1 and "summary.json is the summary of a run, not " in said, said


def test_a_folder_of_results_is_told_by_the_experiment_in_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "experiment.yaml").write_text(QUICKSTART, encoding="utf-8")
    with pytest.raises(SystemExit):
        main(["sim", str(tmp_path)])
    assert f"give {tmp_path / 'experiment.yaml'}" in capsys.readouterr().err


def test_mistakes_inside_a_file_of_the_right_kind_are_listed_as_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "e.yaml").write_text(QUICKSTART.replace("seed:", "sead:").replace("role:", "rol:"), encoding="utf-8")
    with pytest.raises(SystemExit):
        main(["sim", str(tmp_path / "e.yaml")])
    assert "unknown key; nearest is role" in capsys.readouterr().err
