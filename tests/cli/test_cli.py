"""The command as a user meets it: what it prints, what it leaves behind, and how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pdlab import __version__
from pdlab.cli.main import main
from pdlab.real.net.credentials import MAKES_ONE

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = str(ROOT / "experiments" / "quickstart.yaml")
BREAKS = """
from pdlab import Policy

class Breaks(Policy):
    \"\"\"Dispatches {after} requests, then: {statement}.\"\"\"

    def __init__(self):
        self.asked = 0

    def dispatch(self, request, cluster):
        self.asked += 1
        if self.asked > {after}:
            {statement}
        return cluster.prefill[0]
"""


class Run:
    """One call of the command, in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *arguments: str) -> None:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        self.status = ended.value.code or 0
        self.out, self.err = capsys.readouterr()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    return tmp_path


def broken(here: Path, statement: str, after: int = 20) -> str:
    """An experiment whose policy does `statement` after so many dispatches."""
    (here / "breaks.py").write_text(BREAKS.format(statement=statement, after=after))
    experiment = yaml.safe_load(Path(QUICKSTART).read_text())
    (here / "broken.yaml").write_text(yaml.safe_dump({**experiment, "name": "broken", "policy": "breaks.py:Breaks"}))
    return "broken.yaml"


def test_sim_ends_with_a_table_a_picture_and_files(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(capsys, "sim", QUICKSTART, "--requests", "60")
    assert run.status == 0
    for word in ("TTFT", "TPOT", "ITL", "E2E", "transfer", "p99", "SLO attainment", "goodput", "decode-1", "bottleneck"):
        assert word in run.out
    assert "picture  out/quickstart/report.html" in run.out
    there = {file.name for file in (here / "out" / "quickstart").iterdir()}
    assert there == {"summary.json", "requests.parquet", "timeline.parquet", "report.html", "experiment.yaml"}
    assert [file.name for file in (here / "out").iterdir()] == ["quickstart"]
    assert json.loads((here / "out/quickstart/summary.json").read_text())["completed"] == 60


def test_json_prints_the_summary_and_nothing_else(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(capsys, "sim", QUICKSTART, "--requests", "30", "--json", "--out", "there")
    summary = json.loads(run.out)
    assert summary == json.loads((here / "there/summary.json").read_text())
    assert summary["requests"] == 30


def test_quiet_prints_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(capsys, "sim", QUICKSTART, "--requests", "30", "--quiet")
    assert (run.status, run.out, run.err) == (0, "", "")
    assert (here / "out/quickstart/summary.json").is_file()


def test_overrides_and_seed_are_in_the_resolved_experiment(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Run(capsys, "sim", QUICKSTART, "--set", "workload.requests=30", "--set", "slo.ttft_s=2", "--seed", "11", "-q")
    resolved = yaml.safe_load((here / "out/quickstart/experiment.yaml").read_text())
    assert (resolved["seed"], resolved["slo"]["ttft_s"], resolved["workload"]["requests"]) == (11, 2.0, 30)


def test_a_resolved_experiment_gives_the_same_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def figures(file: str, out: str) -> dict[str, object]:
        summary = json.loads(Run(capsys, "sim", file, "--json", "--requests", "60", "--out", out).out)
        return {key: value for key, value in summary.items() if key != "run"}

    assert figures(QUICKSTART, "first") == figures("first/experiment.yaml", "second")


def named(here: Path, name: str, **keys: object) -> str:
    """The quickstart under another name, with other values."""
    experiment = yaml.safe_load(Path(QUICKSTART).read_text())
    (here / f"{name}.yaml").write_text(yaml.safe_dump({**experiment, "name": name, **keys}))
    return f"{name}.yaml"


def test_several_seeds_have_intervals_and_what_is_alike_no_star(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turns = named(here, "turns", policy="round_robin")
    run = Run(capsys, "sim", QUICKSTART, turns, "--requests", "60", "--seeds", "3", "--jobs", "1")
    assert run.status == 0
    for word in ("rests on", "±", "binds", "undecided", "95 % interval over 3 seeds", "quickstart and turns alike", "(seed 7)"):
        assert word in run.out, word
    assert {"seeds.parquet", "report.html", "summary.json"} <= {file.name for file in (here / "out/turns").iterdir()}
    plain = json.loads(Run(capsys, "sim", turns, "--requests", "60", "--seeds", "2", "--jobs", "1", "--json").out)
    assert plain[0]["figures"]["slo_attainment"]["half"] == 0.0 and list(plain[0]["by_seed"]) == ["7", "8"]
    against = Run(capsys, "sim", QUICKSTART, turns, "--requests", "60", "--seeds", "2", "--jobs", "1", "--baseline", "turns", "--force")
    assert "the difference to turns, seed by seed" in against.out


def test_results_of_another_experiment_are_kept(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = Run(capsys, "sim", QUICKSTART, "--requests", "30", "-q")
    assert first.err == ""
    Run(capsys, "sim", QUICKSTART, "--requests", "30", "-q")
    assert [file.name for file in (here / "out").iterdir()] == ["quickstart"], "the same experiment's are replaced"
    other = Run(capsys, "sim", QUICKSTART, "--requests", "31")
    assert "out/quickstart holds another experiment's results: these go to out/quickstart-2 (--force replaces those)" in other.err
    assert json.loads((here / "out/quickstart/summary.json").read_text())["requests"] == 30
    assert json.loads((here / "out/quickstart-2/summary.json").read_text())["requests"] == 31
    Run(capsys, "sim", QUICKSTART, "--requests", "32", "-q", "--force")
    assert json.loads((here / "out/quickstart/summary.json").read_text())["requests"] == 32


def test_two_simulations_are_compared_and_three_are_told_how(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b", "c"):
        Run(capsys, "sim", named(here, name, policy="random" if name == "b" else "round_robin"), "--requests", "60", "-q")
    run = Run(capsys, "compare", "out/a", "out/b")
    assert run.status == 0 and "what differs in the files (a, not b): policy round_robin, not random" in run.out
    assert "<svg" in (here / "compare.html").read_text()
    three = Run(capsys, "compare", "out/a", "out/b", "out/c")
    assert three.status == 2 and "3 simulations: compare takes two; pdlab sim FILE FILE ... --seeds 5 compares more" in three.err


def test_words_are_explained_when_that_is_asked_for(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "arrival to first token" not in Run(capsys, "sim", QUICKSTART, "--requests", "30").out
    assert "arrival to first token" in Run(capsys, "sim", QUICKSTART, "--requests", "30", "--explain").out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--seeds", "0"], "--seeds 0: a figure needs a seed at least"),
        (["--jobs", "0"], "--jobs 0: it takes a process at least"),
        (["--seeds", "2", "--trace-events"], "an event log is of one run"),
        (["--baseline", "quickstart"], "one file has nothing to be compared with"),
        ([QUICKSTART, "--baseline", "nobody"], "--baseline nobody: it is none of quickstart, quickstart-2"),
    ],
)
def test_what_seeds_cannot_be_is_a_line(here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    run = Run(capsys, "sim", QUICKSTART, "--requests", "30", *arguments)
    assert run.status == 2 and said in run.err and not (here / "out").exists()


def test_objectives_in_milliseconds_are_doubted(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(capsys, "sim", QUICKSTART, "--requests", "5", "--set", "slo.ttft_s=500", "--set", "slo.tpot_s=50")
    assert run.status == 0
    assert "slo.ttft_s: 500 seconds; did you mean 0.5?" in run.err and "slo.tpot_s: 50 seconds; did you mean 0.05?" in run.err
    assert "did you mean" not in Run(capsys, "sim", QUICKSTART, "--requests", "5", "--set", "slo.ttft_s=30").err


def test_several_experiments_are_compared(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experiment = yaml.safe_load(Path(QUICKSTART).read_text())
    (here / "random.yaml").write_text(yaml.safe_dump({**experiment, "name": "random", "policy": "random"}))
    run = Run(capsys, "sim", QUICKSTART, "random.yaml", "random.yaml", "--requests", "60", "--jobs", "1")
    comparison = run.out.rsplit("picture", 1)[1]
    assert "quickstart" in comparison
    assert "random-2" in comparison
    assert sorted(file.name for file in (here / "out").iterdir()) == ["quickstart", "random", "random-2"]


def test_traced_events_replay_without_a_difference(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Run(capsys, "sim", QUICKSTART, "--requests", "60", "--trace-events", "-q", "--out", "traced")
    assert {file.name for file in (here / "traced").iterdir()} >= {"events.jsonl", "trace.json.gz"}
    run = Run(capsys, "replay", "traced/events.jsonl")
    assert run.status == 0
    assert run.out.endswith("events replayed, 0 differ\n")


def test_a_log_that_is_cut_off_says_where_and_what_to_do(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Run(capsys, "sim", QUICKSTART, "--requests", "5", "--trace-events", "-q", "--out", "traced")
    log = here / "traced/events.jsonl"
    whole = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(whole[:9]) + whole[9][:30])
    run = Run(capsys, "replay", str(log))
    assert run.status == 2
    assert f"{log}: line 10 is cut off" in run.err
    assert "remove that line" in run.err
    log.write_bytes(b"".join(whole[:9]))
    assert Run(capsys, "replay", str(log)).out == "8 events replayed, 0 differ\n"


def test_how_often_another_policy_differs_is_said_as_shares_are_elsewhere(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Run(capsys, "sim", QUICKSTART, "--requests", "30", "--trace-events", "-q", "--out", "traced")
    run = Run(capsys, "replay", "traced/events.jsonl", "--policy", "random")
    said = [line for line in run.out.split("\n") if " answers differ " in line]
    assert said
    assert all(line.endswith(" %)") for line in said)


def test_a_calibration_that_cannot_begin_says_why_and_nothing_else(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(capsys, "calibrate", QUICKSTART)
    assert run.status == 2
    assert run.out == ""
    assert run.err.startswith("error: model ")


def test_a_log_that_was_tampered_with_does_not_replay(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Run(capsys, "sim", QUICKSTART, "--requests", "30", "--trace-events", "-q", "--out", "traced")
    log = here / "traced/events.jsonl"
    text = log.read_text()
    number, line = next((k, line) for k, line in enumerate(text.split("\n"), 1) if '"type":"Dispatch"' in line)
    log.write_text(text.replace(line, line.replace('"instance":"prefill-0"', '"instance":"prefill-9"')))
    run = Run(capsys, "replay", str(log))
    assert run.status == 1
    assert f"{log}: line {number}," in run.out
    assert f"{number - 2} events replayed alike; the next is answered otherwise, and what follows it" in run.out


def test_a_replay_ends_where_it_departs_whatever_follows(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole log of another policy: its events answer actions that were not replayed."""
    Run(capsys, "sim", QUICKSTART, "--requests", "60", "--trace-events", "-q", "--out", "traced", "--set", "policy=round_robin")
    log = here / "traced/events.jsonl"
    for policy in ("least_loaded", "xllm_slo_aware"):
        head, _, rest = log.read_text().partition("\n")
        log.write_text(f"{head.replace('round_robin', policy)}\n{rest}")
        run = Run(capsys, "replay", str(log))
        assert run.status == 1
        assert "and what follows it in the log was not replayed" in run.out
        log.write_text(f"{head}\n{rest}")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sim", QUICKSTART, "--seed", "-1"], "--seed"),
        (["bench", QUICKSTART, "--seed", "-1"], "--seed"),
        (["compare", "log", "log"], "'log' is a file"),
        (["replay", "log", "--policy", "{a: ["], "error: --policy {a: [: "),
    ],
)
def test_a_wrong_argument_is_named_without_a_traceback(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    (here / "log").write_text("\n")
    run = Run(capsys, *arguments)
    assert run.status == 2
    assert said in " ".join(run.err.split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "modl=x"], "modl: unknown key; nearest is model"),
        (["--set", "policy=prefix_awre"], "did you mean prefix_aware or p2p_prefix?"),
        (["--set", "workload.rate=-1"], "workload.rate: must be above 0, not -1"),
        (["--set", "model=llama-3.1-70b"], "GB missing"),
        (["--set", "nonsense"], "write key.path=value"),
        (["--set", "workload={source: none.csv}"], "none.csv"),
    ],
)
def test_a_mistake_is_plain_lines_exit_2_and_nothing_written(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    run = Run(capsys, "sim", QUICKSTART, *arguments)
    assert run.status == 2
    assert said in run.err
    assert all(line.startswith("error: ") for line in run.err.splitlines())
    assert "Traceback" not in run.err
    assert list(here.iterdir()) == []


def test_the_mistakes_of_all_files_are_told_before_any_is_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "a.yaml").write_text("modl: x\n")
    (here / "b.yaml").write_text("- 1\n")
    run = Run(capsys, "sim", QUICKSTART, "a.yaml", "b.yaml")
    assert run.status == 2
    assert "a.yaml: modl: unknown key" in run.err
    assert "b.yaml: an experiment is a mapping" in run.err
    assert not (here / "out").exists()


@pytest.mark.parametrize(
    ("statement", "said"),
    [("raise ZeroDivisionError('oops')", "ZeroDivisionError"), ("return 'prefill-0'", "prefill-0")],
)
@pytest.mark.parametrize("options", [[], ["--trace-events"]])
def test_a_policy_that_fails_is_named_with_request_and_time(
    here: Path, capsys: pytest.CaptureFixture[str], statement: str, said: str, options: list[str]
) -> None:
    file = broken(here, statement)
    run = Run(capsys, "sim", file, "--requests", "60", *options)
    assert run.status == 2
    assert len(run.err.splitlines()) == 1
    for word in ("Breaks", "request 20", " s", said):
        assert word in run.err
    assert not [path for path in here.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc", ".yaml")]


def test_ctrl_c_keeps_what_there_is_and_marks_it_partial(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(capsys, "sim", broken(here, "raise KeyboardInterrupt", after=40), QUICKSTART, "--requests", "60", "--jobs", "1")
    assert run.status == 130
    assert "partial" in run.err
    summary = json.loads((here / "out/broken/summary.json").read_text())
    assert summary["partial"] is True
    assert 0 < summary["completed"] < 60
    assert not (here / "out/quickstart").exists()


def test_an_unwritable_folder_is_a_users_mistake(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "file").write_text("")
    for options in ([], ["--trace-events"]):
        run = Run(capsys, "sim", QUICKSTART, "--requests", "30", "--out", "file/inside", *options)
        assert run.status == 2
        assert run.err.startswith("error: file/inside: cannot write there")


@pytest.mark.parametrize(("command", "there"), [("policies", "prefix_aware"), ("models", "llama-3.1-8b"), ("hardware", "ascend-910b3")])
def test_what_is_known_by_name_is_listed(here: Path, capsys: pytest.CaptureFixture[str], command: str, there: str) -> None:
    run = Run(capsys, command)
    assert run.status == 0
    assert there in run.out


LLAMA_FP8 = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False, "max_position_embeddings": 131072, "rope_theta": 5e5,
    "quantization_config": {"quant_method": "fp8", "modules_to_not_convert": ["lm_head"]},
}  # fmt: skip


def test_what_was_understood_of_a_config_is_shown(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "mine").mkdir()
    (here / "mine/config.json").write_text(json.dumps(LLAMA_FP8))
    shown = Run(capsys, "models", "show", "mine")
    assert shown.status == 0
    for words in ("8.03 B, 8.03 B active", "9.08 GB", "mlp: 5.64 B, 5.64 GB in fp8", "head: 0.53 B, 1.05 GB in bf16", "128 KiB a token",
                  "131,072 tokens", "32 heads, 8 of KV", "rope_theta"):  # fmt: skip
        assert words in shown.out, words
    figures = json.loads(Run(capsys, "models", "show", "mine/config.json", "--json").out)
    assert figures["parameters"] == 8_029_995_008  # without norms
    assert figures["weights_bytes"] == sum(part["bytes"] for part in figures["weights"])
    assert (figures["kv_bytes_per_token"], figures["context_tokens"]) == (131072, 131072)


def test_a_model_known_by_name_is_shown_too(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(capsys, "models", "show", "deepseek-v3")
    assert run.status == 0
    assert "MLA: 128 heads" in run.out and "8 of 256" in run.out
    assert Run(capsys, "models", "show", "deepseek-v33").status == 2
    wrong = Run(capsys, "models", "show", "nowhere/config.json")
    assert (wrong.status, wrong.err) == (2, "error: model config nowhere/config.json: No such file or directory\n")


def test_figures_from_memory_are_marked(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {line.split()[0]: line for line in Run(capsys, "hardware").out.splitlines()}
    assert rows["a10"].rstrip().endswith("unverified")
    assert "unverified" not in rows["h100-sxm"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--role routr", "--role 'routr' is not one of prefill, decode, mixed, router, all; nearest is router"),
        ("--engine vlm", "--engine 'vlm' is not one of pdlab, vllm; nearest is vllm"),
        ("--kv-transport ib", "--kv-transport 'ib' is not one of auto, shm, tcp, cuda_ipc, nixl"),
        ("--upstream http://a:1", "--upstream is for --engine vllm: add it, or remove --upstream"),
        ("--engine vllm", "--engine vllm needs --upstream URL: where the vLLM server answers"),
        ("--engine vllm --upstream http://a:1", "--engine vllm needs --registry URL: the server at --upstream is registered there"),
        ("--engine vllm --upstream http://a:1 --role all", "--engine vllm is for instances: give --role prefill, decode or mixed, not all"),
        ("--role router", "--role router needs --registry URL: it finds its instances there"),
        ("--role all", "--role all needs an experiment file: its cluster.instances say what to start"),
        ("--role all --registry etcd://a:1", "--role all keeps its registry in memory: remove --registry, or start each role by itself"),
        ("--registry memory://", "--registry memory:// is inside one process: use --role all, or an etcd:// or redis:// server"),
        ("--trace-events x", "--trace-events is a router's: use it with --role router or all (an engine has --log)"),
        ("--role decode --host 0.0.0.0", "--host 0.0.0.0 is no address that others can reach: give --advertise HOST, too"),
        (
            "--role decode --host 10.0.0.1",
            "--host 10.0.0.1 can be reached by others: give --internal-token (or PDLAB_INTERNAL_TOKEN), the same to all of the cluster; "
            f"this makes one: {MAKES_ONE.format(name='PDLAB_INTERNAL_TOKEN')}",
        ),
        *(
            (
                f"{role} --host {host}",
                f"--host {host} can be reached by others: give --api-key (or PDLAB_API_KEY); "
                f"this makes one: {MAKES_ONE.format(name='PDLAB_API_KEY')}",
            )
            for role in ("--role mixed", "--role router --registry redis://127.0.0.1:1", f"{QUICKSTART} --role all")
            for host in ("0.0.0.0", "::", "10.0.0.1")
        ),
        (
            "--role router --registry redis://127.0.0.1:1 --api-key sesame",
            "--api-key needs --internal-token (or PDLAB_INTERNAL_TOKEN), the same to all of the cluster: else its instances answer "
            f"whoever asks them; this makes one: {MAKES_ONE.format(name='PDLAB_INTERNAL_TOKEN')}",
        ),
        ("--ssl-keyfile key.pem", "--ssl-keyfile needs --ssl-certfile: the certificate that it belongs to"),
        ("--ssl-certfile no.pem", "--ssl-certfile no.pem: No such file or directory"),
        ("--ssl-ca-certs no.pem", "--ssl-ca-certs no.pem: No such file or directory"),
    ],
)
def test_options_of_serve_that_do_not_go_together(here: Path, capsys: pytest.CaptureFixture[str], options: str, says: str) -> None:
    run = Run(capsys, "serve", *options.split())
    assert (run.status, run.out, run.err) == (2, "", f"error: {says}\n")


def test_an_operator_must_say_which_cluster(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["status"], ["drain", "i0"], ["switch", "i0", "decode"]):
        run = Run(capsys, *command)
        assert (run.status, run.out, run.err) == (2, "", "error: give either --registry URL, or --router URL of a running router\n")
    assert Run(capsys, "switch", "i0", "decod").err == "error: role 'decod' is not one of prefill, decode, mixed; nearest is decode\n"


def test_trace_is_the_workload_command(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(capsys, "trace", "--help")
    assert run.status == 0
    for command in ("stats", "synth"):
        assert command in run.out


@pytest.mark.parametrize("arguments", [["--version"], ["sim", "--help"]])
def test_the_command_answers_as_a_program(arguments: list[str]) -> None:
    ended = subprocess.run([sys.executable, "-m", "pdlab", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.strip() == f"pdlab {__version__}" or "--trace-events" in ended.stdout


def test_costs_make_writes_a_table_that_an_experiment_takes(capsys, tmp_path):
    path = tmp_path / "made" / "costs.json"
    made = Run(capsys, "costs", "make", "--model", "llama-3.1-8b", "--hardware", "h100-sxm", "--out", str(path))
    assert made.status == 0
    assert "TPOT within" in made.out
    quick = ("sim", QUICKSTART, "--set", "workload.requests=50", "--quiet", "--json", "--out")
    by_table = json.loads(Run(capsys, *quick, str(tmp_path / "a"), "--set", f"cost.table={path}").out)
    by_roofline = json.loads(Run(capsys, *quick, str(tmp_path / "b")).out)
    assert by_table["tpot_s"]["mean"] == pytest.approx(by_roofline["tpot_s"]["mean"], rel=0.02)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--engine", "vlm"), "nearest is vllm"),
        (("--tp", "3"), "does not divide"),
        (("--weight-dtype", "fp9"), "did you mean 'fp8'"),
        (("--source", "kernels", "--ep", "2", "--tp", "2"), "--ep is not passed on"),
        (("--out", "/dev/null/x.json"), "--out /dev/null/x.json"),
    ],
)
def test_costs_make_says_what_it_does_not_take(capsys, more, words):
    made = Run(capsys, "costs", "make", "--model", "llama-3.1-8b", "--hardware", "h100-sxm", *more)
    assert made.status == 2
    assert words in made.err
    assert len(made.err.strip().splitlines()) == 1
