"""The board: rows are read as what they mean, simulated as they were measured, and scored."""

import csv
from dataclasses import replace
from io import StringIO
from math import exp

import pandas as pd
import pytest
from rich.console import Console

from pdlab.core.types import UsageError
from pdlab.cost.measurements import MeasuredRow, Side, read_rows, throughput_per_gpu
from pdlab.cost.parallel import Parallel
from pdlab.cost.roofline import coefficients
from pdlab.search.board.page import board_page, board_table, coverage_lines, order_lines, write_board
from pdlab.search.board.run import ScoredRow, closed_loop_means, experiment_of, score
from pdlab.search.board.score import by_band, coverage, groups, interval_holds, order, spearman
from pdlab.search.pool import SimulationTask, WarmSimulator
from pdlab.sim import simulate

HEAD = (
    "id,backend,model_path,system,precision,mode,isl,osl,tp_size,attention_dp_size,moe_tp_size,moe_ep_size,"
    "prefill_num_workers,prefill_tp_size,decode_num_workers,decode_tp_size,silicon_ttft_ms,silicon_tpot_ms,concurrency"
)
AGG = "a,vllm,meta-llama/Llama-3.1-8B-Instruct,h100_sxm,fp8,agg,1000,100,2,1,2,1,,,,,50,8,4"
PD = "p,trtllm,Qwen/Qwen3-32B,h200_sxm,bf16,disagg,1000,100,,,,,2,1,1,2,80,9,8"


@pytest.fixture
def table(tmp_path):
    def write(*lines, head=HEAD):
        path = tmp_path / "rows.csv"
        path.write_text("\n".join((head, *lines)) + "\n")
        return path

    return write


def row(**changes) -> MeasuredRow:
    made = MeasuredRow(
        id="r",
        model_name="llama-3.1-8b",
        hardware_name="h100-sxm",
        engine="vllm",
        version="",
        weight_dtype="bf16",
        kv_dtype="bf16",
        mtp_tokens=0,
        sides=(Side("mixed", 1, Parallel(tp=1)),),
        concurrency=4,
        prompt_tokens=500,
        output_tokens=50,
        ttft_s=0.05,
        tpot_s=0.01,
    )
    return replace(made, **changes)


class AtHand:
    """A pool in this process."""

    def run(self, tasks):
        simulator = WarmSimulator()
        yield from map(simulator.perform, tasks)

    def close(self):
        pass


def test_a_row_is_read(table):
    rows, left_out = read_rows(table(AGG))
    assert not left_out
    (one,) = rows
    assert (one.model_name, one.hardware_name, one.weight_dtype, one.kv_dtype) == ("llama-3.1-8b", "h100-sxm", "fp8", "bf16")
    assert (one.ttft_s, one.tpot_s, one.gpus, one.disaggregated) == (0.05, 0.008, 2, False)


def test_a_disaggregated_row_has_two_sides(table):
    ((one,), _) = read_rows(table(PD))
    assert one.sides == (Side("prefill", 2, Parallel(tp=1)), Side("decode", 1, Parallel(tp=2)))
    assert one.gpus == 4


@pytest.mark.parametrize(
    ("listed", "meant"),
    [
        ("64,1,8,8", Parallel(tp=8, ep=8)),  # n x n experts beside n^2 accelerators ran on n
        ("1,16,4,4", Parallel(tp=4, dp_attention=4, ep=4)),
        ("1,8,1,8", Parallel(tp=8, dp_attention=8, ep=8)),
        ("8,1,8,1", Parallel(tp=8)),
        ("4,,2,2", Parallel(tp=4, ep=2)),
        ("1,,4,1", Parallel(tp=4, dp_attention=4)),
        ("8,,1,1", Parallel(tp=8)),
    ],
)
def test_parallel_columns_are_read_as_what_they_mean(table, listed, meant):
    line = f"a,sglang,deepseek-ai/DeepSeek-R1,b200_sxm,fp4,agg,1000,100,{listed},,,,,50,8,4"
    ((one,), _) = read_rows(table(line))
    assert one.sides[0].parallel == meant


WIDE = "1,1,1,32,32,1"  # of 32 accelerators: workers, tp, pp, attention's data parallelism, experts' tp and ep
SMALL = "1,1,1,4,4,1"
COLUMNS = ("num_workers", "tp_size", "pp_size", "attention_dp_size", "moe_tp_size", "moe_ep_size")


@pytest.mark.parametrize(
    ("server", "sizes", "prefill", "decode", "meant"),
    [
        ("sglang,0.5.5.post2,gb200", "1024,1024", SMALL, SMALL, (Parallel(tp=4), Parallel(tp=4))),
        ("sglang,0.5.5.post2,gb200", "8192,1024", SMALL, WIDE, (Parallel(tp=4), None)),
        ("sglang,0.5.5.post2,gb200", "1024,1024", SMALL, WIDE, (None, None)),
        ("sglang,0.5.8,gb200", "1024,1024", SMALL, SMALL, (None, None)),
        ("sglang,0.5.8,b200", "1024,1024", SMALL, "1,8,1,1,1,8", (Parallel(tp=4, dp_attention=4), Parallel(tp=8, ep=8))),
        ("trtllm,0.8.1.post2,b200", "1024,1024", "1,1,1,8,1,8", "1,8,1,1,1,8", (Parallel(tp=8, dp_attention=8), Parallel(tp=8, ep=8))),
    ],
)
def test_disaggregated_rows_are_read_as_their_recipes_say(tmp_path, server, sizes, prefill, decode, meant):
    columns = [f"{side}_{key}" for side in ("prefill", "decode") for key in COLUMNS]
    head = "backend,backend_version,system,isl,osl,mode,model_path,precision,concurrency,silicon_ttft_ms,silicon_tpot_ms"
    line = f"{server},{sizes},disagg,deepseek-ai/DeepSeek-V3,fp8,64,500,10,{prefill},{decode}"
    path = tmp_path / "rows.csv"
    found = []
    for end in ("", ",default"):
        path.write_text(f"{','.join((head, *columns))}{',launch' if end else ''}\n{line}{end}\n")
        ((one,), _) = read_rows(path)
        found.append([side.parallel for side in one.sides])
    as_launched, as_listed = found
    assert as_launched == [said or listed for said, listed in zip(meant, as_listed, strict=True)]


def test_rows_that_say_too_little_are_left_out_with_a_reason(table):
    lines = [AGG.replace("h100_sxm", "h1000"), PD.replace(",2,1,1,2,80", ",,1,1,2,80"), AGG[:-2] + ","]
    rows, left_out = read_rows(table(*lines))
    assert not rows
    assert [reason.split(" ")[0:2] for _, reason in left_out] == [
        ["unknown", "hardware"],
        ["prefill_num_workers", "is"],
        ["concurrency", "is"],
    ]


def test_a_table_says_that_a_server_was_launched_as_its_engine_is_by_default(table):
    rows, left_out = read_rows(table(f"{AGG},default", f"{AGG},", f"{AGG},fast", head=f"{HEAD},launch"))
    assert [one.as_default for one in rows] == [True, False]
    assert "launch 'fast' is not default" in left_out[0][1]


def test_a_table_of_another_form_is_refused(table, tmp_path):
    with pytest.raises(UsageError, match="lacks system"):
        read_rows(table(AGG, head=HEAD.replace("system", "chip")))
    with pytest.raises(UsageError, match="No such file"):
        read_rows(tmp_path / "none.csv")


def test_throughput_is_littles_law():
    # 4 requests of 45 tokens each every 0.05 + 44 * 0.01 s, on one accelerator
    assert row().tokens_per_s_per_gpu == pytest.approx(4 * 45 / 0.49)
    assert throughput_per_gpu(row(sides=(Side("mixed", 1, Parallel(tp=2)),)), 0.05, 0.01) == pytest.approx(2 * 45 / 0.49)


def test_a_row_is_simulated_as_a_closed_loop_of_ten_waves():
    experiment = experiment_of(row())
    result = simulate(experiment)
    running = result.requests
    assert len(running) == 40
    assert running["prompt_tokens"].between(400, 500).all()
    assert running["output_tokens"].between(40, 50).all()
    begun = running["arrival_s"].to_numpy()
    assert (begun[:4] == 0).all()
    assert (begun[4:] > 0).all()


def test_a_row_that_was_made_by_the_simulator_has_no_error():
    made = closed_loop_means(simulate(experiment_of(row())))
    (one,) = score([row(ttft_s=made["ttft_s"], tpot_s=made["tpot_s"])], AtHand())
    assert one.failure == ""
    assert max(map(abs, one.errors.values())) < 1e-12


def test_what_does_not_fit_is_a_failure_with_its_reason():
    (one,) = score([row(model_name="llama-3.1-405b")], AtHand())
    assert "does not fit" in one.failure
    (group,) = groups([one], by_band)
    assert (group.rows, group.failures, group.errors) == (1, 1, {})


def scored(tpot_s, simulated_s, tp=1, **changes):
    return ScoredRow(row(tpot_s=tpot_s, sides=(Side("mixed", 1, Parallel(tp=tp)),), **changes), ttft_s=0.05, tpot_s=simulated_s)


def test_errors_of_a_group():
    (group,) = groups([scored(0.01, 0.012), scored(0.02, 0.018), scored(0.03, 0.03)], by_band)
    found = group.errors["tpot"]
    assert group.key == ("<= 64",)
    assert (found.mape, found.median, found.bias, found.spearman) == pytest.approx((0.1, 0.1, 0.1 / 3, 1.0))


def test_spearman_ranks_ties_at_their_mean():
    assert spearman(pd.Series([1.0, 2, 3]).to_numpy(), pd.Series([3.0, 2, 1]).to_numpy()) == pytest.approx(-1)
    a, b = pd.Series([1.0, 2, 2, 4]), pd.Series([1.0, 3, 2, 5])
    assert spearman(a.to_numpy(), b.to_numpy()) == pytest.approx(a.rank().corr(b.rank()))
    assert spearman(a.to_numpy()[:2], b.to_numpy()[:2]) is None


def test_order_counts_decided_pairs_only():
    # by TPOT, which orders as throughput does: one of two pairs is right; the two of tp 1 are one set-up
    rows = [scored(0.010, 0.010, tp=1), scored(0.016, 0.008, tp=4), scored(0.0101, 0.004, tp=1), scored(0.03, 0.04, concurrency=8)]
    found = order(rows, "tpot")
    assert (found.right, found.pairs) == (1.0, 2)


def test_coverage_counts_rows_whose_interval_holds_the_measured_figure():
    error = coefficients("h100-vllm").error
    inside, outside = exp(0.99 * error), exp(1.01 * error)
    failed = ScoredRow(row(id="bad"), failure="does not fit")
    rows = [scored(0.01, 0.01 * inside), scored(0.01, 0.01 / inside), scored(0.01, 0.01 * outside), failed]
    assert [interval_holds(one, "tpot") for one in rows] == [True, True, False, None]
    found = coverage(rows, "tpot")
    assert (found.held, found.rows) == (2, 3)
    assert "TPOT hold the measured figure: <= 64 66.7 % of 3" in coverage_lines(rows)[0]
    assert coverage_lines([failed]) == []


def test_the_table_fits_a_terminal():
    long = [
        scored(0.01, 0.013, model_name="qwen3.5-397b-a17b", hardware_name="gb200-nvl72", engine="trtllm", concurrency=c) for c in (8, 128)
    ]
    console = Console(width=80, file=StringIO())
    console.print(board_table([*long, ScoredRow(row(id="bad"), failure="does not fit")], []))
    text = console.file.getvalue()
    assert "qwen3.5-397b-a17b gb200-nvl72 trtllm, <= 64" in text
    assert max(map(len, text.splitlines())) <= 80


def test_the_page_and_the_rows_are_written(tmp_path):
    rows = [scored(0.010, 0.010), ScoredRow(row(id="bad"), failure="does not fit")]
    page, table = write_board(tmp_path / "b", "mine", rows, [("x", "concurrency is missing")])
    text = page.read_text()
    assert "does not fit" in text
    assert "concurrency is missing" in text
    frame = pd.read_parquet(table)
    assert list(frame["id"]) == ["bad", "r"]
    assert frame.loc[frame["id"] == "r", "tpot_error"].item() == pytest.approx(0.0)
    assert board_page("mine", rows, []).count("<table>") == 2
    assert order_lines(rows) == []


def test_a_task_tells_what_was_asked_of_it():
    experiment = experiment_of(row())
    done = WarmSimulator().perform(SimulationTask("k", experiment, figures=closed_loop_means))
    assert set(done.figures) == {"ttft_s", "tpot_s"}


def test_the_table_has_the_columns_that_its_head_names(table):
    with table(AGG, PD).open() as lines:
        assert all(None not in line and None not in line.values() for line in csv.DictReader(lines))
