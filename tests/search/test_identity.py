"""Equal hashes, equal runs; what decides nothing is not in them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pdlab.experiment.experiment import Experiment
from pdlab.search import identity
from pdlab.search.identity import RunHashes

ROOT = Path(__file__).resolve().parents[2]
POLICY = """
from pdlab import Policy

class Mine(Policy):
    def dispatch(self, request, cluster):
        return cluster.prefill[{}]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return Path(shutil.copy(ROOT / "experiments" / "quickstart.yaml", tmp_path / "one.yaml"))


def test_folder_and_name_decide_nothing(file: Path) -> None:
    other = file.parent / "elsewhere" / "two.yaml"
    other.parent.mkdir()
    shutil.copy(file, other)
    assert RunHashes().of(Experiment.load(file)) == RunHashes().of(Experiment.load(other, ["name=two"]))


def test_a_seed_and_a_key_decide(file: Path) -> None:
    base = Experiment.load(file)
    hashes = RunHashes()
    assert len({hashes.of(one) for one in (base, base.with_(seed=8), base.with_({"slo.ttft_s": 0.5}), base.with_(policy="random"))}) == 4


def test_a_default_that_is_said_is_the_default(file: Path) -> None:
    assert RunHashes().of(Experiment.load(file)) == RunHashes().of(Experiment.load(file, ["limits.max_attempts=3"]))


def test_the_source_of_the_users_policy_decides(file: Path) -> None:
    policy = file.parent / "mine.py"
    policy.write_text(POLICY.format(0))
    experiment = Experiment.load(file, ["policy=mine.py"])
    first = RunHashes().of(experiment)
    policy.write_text(POLICY.format(-1))
    assert RunHashes().of(experiment) != first


def test_the_content_of_a_trace_decides(file: Path) -> None:
    trace = file.parent / "t.csv"
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n0.0,10,5\n1.0,20,5\n")
    experiment = Experiment.load(file, ["workload={source: t.csv}"])
    first = RunHashes().of(experiment)
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n0.0,10,5\n1.0,21,5\n")
    assert RunHashes().of(experiment) != first


def test_pdlabs_own_source_decides(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = RunHashes().of(Experiment.load(file))
    monkeypatch.setattr(identity, "code_hash", lambda: "another version's")
    assert RunHashes().of(Experiment.load(file)) != first
