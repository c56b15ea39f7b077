"""Experiment files in which YAML or its types surprise."""

import pytest
import yaml

from pdlab.core.types import UsageError
from pdlab.experiment.experiment import Experiment

GOOD = {
    "name": "x",
    "model": "smollm2-135m",
    "workload": {"source": "synthetic", "requests": 3, "rate": 100, "prompt": 8, "output": 4},
    "cluster": {"instances": [{"role": "mixed", "count": 1, "hardware": "l4"}]},
}
TEXT = yaml.safe_dump(GOOD, sort_keys=False)


@pytest.fixture
def loaded(tmp_path):
    def load(text):
        path = tmp_path / "e.yaml"
        path.write_text(text, encoding="utf-8")
        return Experiment.load(path)

    return load


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("rate: 100", "rate: yes", "workload.rate: must be a number, not true"),
        ("requests: 3", "requests: on", "workload.requests: must be a number, not true"),
        ("prompt: 8", "prompt: {uniform: [no, 5]}", "workload.prompt.uniform: must be a number, not false"),
        ("prompt: 8", "prompt: {constant: true}", "workload.prompt.constant: must be a number, not true"),
        ("output: 4", "output: 4\n  arrival: {process: gamma, cv: yes}", "workload.arrival.cv: must be a number, not true"),
        ("rate: 100", "rate: 1:30", "workload.rate: must be a number, not '1:30'"),
        ("requests: 3", "requests: 2026-01-01", "workload.requests: must be a whole number, not '2026-01-01'"),
        ("name: x", "? [a, b]\n: 1\nname: x", "line 1, column 3: ['a', 'b'] cannot be a key"),
        ("name: x", "? {a: b}\n: 1\nname: x", "line 1, column 3: {'a': 'b'} cannot be a key"),
        ("name: x", "name: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
        ("name: x", 'name: "a\\nb"', "name: names the folder of the results, which cannot be 'a\\nb'"),
        ("name: x", "name: " + "é" * 101, "name: names the folder of the results"),
    ],
)
def test_a_surprise_is_a_mistake_in_one_line(loaded, before, after, said):
    assert before in TEXT
    with pytest.raises(UsageError) as caught:
        loaded(TEXT.replace(before, after, 1))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("written", "rate"),
    [("1e2", 100), ("1.5e+1", 15), (".5", 0.5), ("+3", 3), ("1_000", 1000), ("010", 10), ("0x10", 16), ("2.", 2), ("1.e1", 10), ("'7'", 7)],
)
def test_numbers_are_those_that_people_mean(loaded, written, rate):
    assert loaded(TEXT.replace("rate: 100", f"rate: {written}")).workload.rate == rate


def test_dates_are_text_and_flags_stay_flags(loaded):
    assert loaded(TEXT.replace("name: x", "name: 2026-01-01")).name == "2026-01-01"
    assert loaded(TEXT + "engine: {prefix_cache: no}\n").engine.prefix_cache is False
