"""Traces as people have them: each was refused, misread or read with a traceback by the release before."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from pdlab.cli.trace import app
from pdlab.core.types import UsageError
from pdlab.workload.base import Workload
from pdlab.workload.columns import Wanted
from pdlab.workload.readers import load
from pdlab.workload.spec import WorkloadSpec, build
from pdlab.workload.stats import stats

CASES = Path(__file__).resolve().parents[2] / "../shared/cases/traces"


def case(name: str, **wanted: object) -> Workload:
    """As the trace of an experiment, and the same by `pdlab trace stats`."""
    if not CASES.exists():
        pytest.skip(f"{CASES} is absent")
    result = CliRunner().invoke(app, ["stats", str(CASES / name)])
    assert result.exit_code == 0, result.output
    return build(WorkloadSpec.model_validate({"source": name, **wanted}), 0, CASES)


def columns(workload: Workload) -> tuple[list[float], list[int], list[int]]:
    return workload.arrival_s.round(6).tolist(), workload.prompt_tokens.tolist(), workload.output_tokens.tolist()


@pytest.mark.parametrize(
    ("name", "second_s", "said"),
    [
        ("az_crlf_bom.csv", 4.314579, "without an offset"),
        ("az_float.csv", 4.314579, "without an offset"),
        ("az_tz.csv", 0.99007, "with an offset"),
        ("az_tz8.csv", 0.99007, "with an offset"),
        ("az_z.csv", 1.49007, "with an offset"),
    ],
)
def test_azure_files_with_whatever_dates_and_cells(name: str, second_s: float, said: str) -> None:
    workload = case(name)
    assert columns(workload) == ([0.0, second_s], [374, 396], [44, 109])
    assert f"TIMESTAMP (ISO 8601, {said} from UTC)" in workload.reading


def test_ids_of_16_tokens_in_mooncakes_form_count_as_such() -> None:
    workload = case("mc_block16.jsonl")
    prefix = stats(workload)["prefix"]
    assert (workload.hash_tokens, prefix["token_hit_ratio"]) == (16, 32 / 2048)
    assert "hash_ids of 16 tokens each" in workload.reading
    with pytest.raises(UsageError, match=r"line 1, column hash_ids: 64 ids for 1,024 tokens do not go with 512 tokens each"):
        case("mc_block16.jsonl", hash_tokens=512)


def test_a_burst_stays_one() -> None:
    assert not case("mc_burst0.jsonl").arrival_s.any()


def test_turns_with_delays_come_after_the_answers_before() -> None:
    workload = case("mc_delay.jsonl")
    assert workload.after is not None
    assert (workload.after.tolist(), workload.arrival_s.tolist(), workload.hash_tokens) == ([-1, 0], [0.0, 5.0], 512)
    assert list(workload.hashes or ()) == [(1,), (1, 2)]
    assert "delay (ms) after the answer before, by session_id" in workload.reading


def test_vidurs_traces_are_known() -> None:
    assert columns(case("vidur.csv")) == ([0.0, 1.5], [100, 200], [20, 30])


def test_null_is_no_ids() -> None:
    assert case("mc_nullhash.jsonl").hashes is None


def test_what_was_right_stays_so() -> None:
    burst = case("burst_v2.csv")
    assert (columns(burst), burst.dropped) == (([0.0, 2.0], [472, 10], [18, 5]), 1)
    wide = case("mc_u64.jsonl")
    assert list(wide.hashes or ()) == [(4294967301, 4294967302), (8589934597, 8589934598)]
    assert len(case("burst_sparse.csv")) == 200


def test_only_mooncakes_published_trace_is_spread() -> None:
    published = CASES.parents[1] / "data/traces/mooncake_conversation_trace.jsonl.zst"
    if not published.exists():
        pytest.skip(f"{published} is absent")
    workload = load(published)
    assert np.all(np.diff(workload.arrival_s) > 0)
    assert "steps of 3 s" in workload.notes[0]
    head = load(published, requests=30)
    assert np.array_equal(head.arrival_s, workload.arrival_s[:30])
    assert list(head.hashes or ()) == list(workload.hashes or ())[:30]
    as_told = load(published, wanted=Wanted(time_unit="ms"))
    assert as_told.notes == workload.notes
