"""The JSON schema that editors read: it takes what pdlab takes, and says what every key means."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pdlab.cli.main import app
from pdlab.experiment.experiment import Experiment
from pdlab.experiment.schema import DESCRIPTIONS, schema
from pdlab.experiment.yaml import read_yaml

HERE = Path(__file__).parents[2]
FILES = [path for path in sorted((HERE / "experiments").glob("*.yaml")) if "two_worlds" not in path.name]
QUICK = read_yaml(HERE / "experiments" / "quickstart.yaml")


def properties(whole: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, kind in {"Experiment": whole, **whole["$defs"]}.items():
        for key, of in kind.get("properties", {}).items():
            yield f"{name}.{key}", of


def test_the_command_prints_it() -> None:
    ended = CliRunner().invoke(app, ["schema"])
    assert ended.exit_code == 0 and json.loads(ended.output) == schema()
    assert json.loads(ended.output)["$schema"] == "https://json-schema.org/draft/2020-12/schema"


def test_every_key_has_a_description_and_every_description_a_key() -> None:
    found = dict(properties(schema()))
    assert [name for name, of in found.items() if not of.get("description", "").strip()] == []
    assert set(DESCRIPTIONS) == set(found)


def test_names_are_offered() -> None:
    found = dict(properties(schema()))
    assert "h100-sxm" in found["InstancesSpec.hardware"]["examples"] and "llama-3.1-8b" in found["Experiment.model"]["examples"]
    assert "prefix_aware" in found["Experiment.policy"]["examples"] and "azure-conv-2023" in found["WorkloadSpec.source"]["examples"]
    assert found["EngineSpec.batching"]["anyOf"][0]["enum"] == [
        "chunked",
        "decode_first",
        "delayed",
        "online_first",
        "prefill_first",
        "slide_batching",
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_files_that_pdlab_takes_are_valid(path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(schema())
    jsonschema.validate(json.loads(json.dumps(read_yaml(path))), schema())
    jsonschema.validate(Experiment.load(path).resolved(), schema())


@pytest.mark.parametrize(
    "change",
    [
        {"workload": {"source": "synthetic", "requests": 3, "rate": 1.0, "prompt": 64, "output": {"uniform": [1, 9]}}},
        {
            "workload": {
                "source": "synthetic",
                "requests": 3,
                "rate": 1.0,
                "prompt": {"lognormal": {"median": 9, "cv": 1}},
                "output": 3,
                "arrival": "constant",
            }
        },
        {"workload": {**QUICK["workload"], "arrival": {"process": "ramp", "to_rate": 3.0, "over_s": 9}, "ttft_slo_s": {0: 5.0}}},
        {"policy": {"name": "power_of_two"}},
        {"faults": [{"at_s": 3, "kill": "decode-0"}]},
    ],
)
def test_what_a_key_may_be_instead_is_valid_too(change: dict[str, Any]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    Experiment.parse({**QUICK, **change})
    jsonschema.validate(json.loads(json.dumps({**QUICK, **change})), schema())


@pytest.mark.parametrize(
    "wrong",
    [
        {"sede": 3},
        {"engine": {"max_num_seqs": 3}},
        {"transfer": {"mode": "psh"}},
        {"seed": -1},
        {"slo": {"ttft_s": "fast"}},
        {"model": None},
    ],
)
def test_mistakes_are_underlined(wrong: dict[str, Any]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**QUICK, **wrong}, schema())
