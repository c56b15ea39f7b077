"""Both worlds on this machine: what the file may say, what counts as agreement, and a whole small run (slow)."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from pdlab.cli.main import main
from pdlab.core.file_kinds import TWO_WORLDS
from pdlab.core.types import UsageError
from pdlab.cost.profile import save_instance_profile
from pdlab.experiment.experiment import Experiment
from pdlab.experiment.yaml import read_yaml
from pdlab.proof.validate import SPENT, Outcome, TwoWorlds, take_turns, turned, validate
from pdlab.results.comparison import Comparison, Ranking
from pdlab.results.comparison_stored import load_checks, plain
from pdlab.results.run_store import RunStore, StoredRun
from pdlab.sim import simulate
from tests.proof.calibrate.test_pool import profile
from tests.support.measured_runs import measured

LOOP_S = 2e-5  # of the probe, on a core that nobody disturbs
EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"


@pytest.mark.parametrize("name", ["two_worlds", "two_worlds_full", "two_worlds_vllm"])
def test_the_files_that_ship_are_sound(name: str) -> None:
    asked = TwoWorlds.load(EXPERIMENTS / f"{name}.yaml")
    assert asked.name == name
    assert len(asked.policies) >= 2
    assert asked.repeats >= 2


@pytest.mark.parametrize("repeats", [1, 2, 3, 7])
def test_each_repeat_begins_with_another(repeats: int) -> None:
    orders = [tuple(turned(range(6), repeat, repeats)) for repeat in range(repeats)]
    assert orders[0] == tuple(range(6))
    assert all(sorted(order) == list(range(6)) for order in orders)
    assert len({order[0] for order in orders}) == min(repeats, 6)


def test_mistakes_in_the_file_show_before_anything_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text("experiment: {}\nlayouts: {}\npolicies: {}\nrates: []\nrepeat: 2\n")
    with pytest.raises(UsageError, match="rates") as told:
        TwoWorlds.load(file)
    assert "repeat: unknown key; nearest is repeats" in str(told.value)
    sound = read_yaml(EXPERIMENTS / "two_worlds.yaml", TWO_WORLDS)
    sound["policies"] = {"mine": "rund_robin"}
    import yaml

    file.write_text(yaml.safe_dump({**sound, "experiment": {**sound["experiment"], "base_dir": str(EXPERIMENTS)}}))
    with pytest.raises(SystemExit) as ended:
        main(["validate", str(file), "--out", str(tmp_path / "out")])
    assert ended.value.code == 2
    assert "round_robin" in capsys.readouterr().err


def test_rates_of_the_command_line_stand_in_place_of_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = EXPERIMENTS / "two_worlds.yaml"
    assert TwoWorlds.load(file, [1.0, 4.5]).rates == [1.0, 4.5]
    assert TwoWorlds.load(file).rates == [2.5]
    with pytest.raises(SystemExit) as ended:
        main(["validate", str(file), "--out", str(tmp_path / "out"), "--rate", "0"])
    assert ended.value.code == 2
    assert "rates.0: must be above 0, not 0.0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("layouts", "wrong"),
    [
        ({"two": [{"role": "mixed", "count": 2, "hardware": "l4"}]}, "one prefill instance, then one decode"),
        ({"1d1p": [{"role": "decode", "hardware": "l4"}, {"role": "prefill", "hardware": "l4"}]}, "one prefill instance, then one decode"),
        ({}, "no vLLM beside"),
    ],
)
def test_what_vllm_cannot_be_is_said_before_anything_starts(
    layouts: dict[str, object], wrong: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import yaml

    plan = read_yaml(EXPERIMENTS / "two_worlds_vllm.yaml", TWO_WORLDS)
    file = tmp_path / "vllm.yaml"
    file.write_text(yaml.safe_dump({**plan, "layouts": layouts or plan["layouts"]}))
    with pytest.raises(SystemExit) as ended:
        main(["validate", str(file), "--out", str(tmp_path / "out"), "--vllm", str(tmp_path / "a/venv/bin/python")])
    assert ended.value.code == 2
    assert wrong in capsys.readouterr().err


def test_there_is_nothing_to_judge_again_before_it_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["validate", str(EXPERIMENTS / "two_worlds.yaml"), "--out", str(tmp_path / "out"), "--again"])
    assert ended.value.code == 2
    assert "profile-1.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("pairs", "line", "code"),
    [
        ([(3, 3), (2, 2)], "policies rank alike in 5 of 5 pairs that the measured runs decide", None),
        ([(3, 3), (1, 2)], "policies rank alike in 4 of 5 pairs that the measured runs decide", 1),
        ([(0, 0)], "the measured runs decide no pair of policies", None),
    ],
)
def test_the_verdict_counts_the_pairs_of_policies(
    pairs: list[tuple[int, int]],
    line: str,
    code: int | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rankings = tuple(Ranking("TTFT mean", (), (), agree, decided, 3) for agree, decided in pairs)
    outcome = Outcome({"1p1d, 2 req/s": Comparison((), rankings)}, [], [], 0.03, 60.0)
    monkeypatch.setattr("pdlab.proof.validate.validate", lambda *args, **options: outcome)
    with pytest.raises(SystemExit) as ended:
        main(["validate", str(EXPERIMENTS / "two_worlds.yaml"), "--out", str(tmp_path)])
    assert (ended.value.code or None) == code
    said = capsys.readouterr().out
    assert line in said and ("do not agree" in said) == bool(code)


@pytest.mark.parametrize("before", range(6))
@pytest.mark.parametrize(
    ("prefill", "decode"), [(("a", "b"), ("a", "b")), (("a", "b", "c"), ("x", "y")), (("a",), ("x",)), (("a",), ("x", "y"))]
)
def test_a_run_begins_with_the_first_instance_whatever_was_asked_before(
    before: int, prefill: tuple[str, ...], decode: tuple[str, ...]
) -> None:
    """Policies in turn, against a server that takes turns; only requests of more than a token reach a decode instance of another name."""
    mixed = prefill == decode
    turns = {"prefill": before, "decode": before // 2}

    def answers(tokens: int) -> dict[str, str]:
        told = {"prefill_instance": prefill[turns["prefill"] % len(prefill)]}
        turns["prefill"] += 1
        if mixed:
            return {**told, "decode_instance": told["prefill_instance"]}
        if tokens > 1:
            told["decode_instance"] = decode[turns["decode"] % len(decode)]
            turns["decode"] += 1
        return told

    async def complete(request: web.Request) -> web.Response:
        assert request.headers["X-PDLab-Timeline"] == "1"
        asked = await request.json()
        return web.json_response({"choices": [], "pdlab": {"timeline": answers(asked["max_tokens"])}})

    async def models(request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "m"}]})

    async def play() -> None:
        app = web.Application()
        app.add_routes([web.get("/v1/models", models), web.post("/v1/completions", complete)])
        async with TestServer(app) as server:
            await take_turns(str(server.make_url("")).rstrip("/"), prefill, decode)

    asyncio.run(play())
    for _ in range(SPENT):
        answers(1)
    first = answers(2)
    assert (first["prefill_instance"], first["decode_instance"]) == (prefill[0], decode[0])


def judged_again(folder: Path, loops: list[list[float]]) -> tuple[Outcome, RunStore]:
    """Two policies' measured runs, which are simulations 5 % slower, beside a profile; `loops` is what the probe saw of the cores."""
    file = folder / "plan.yaml"
    plan = {
        "experiment": {
            "model": "smollm2-135m",
            "seed": 3,
            "workload": {"source": "synthetic", "requests": 20, "prompt": {"uniform": [20, 60]}, "output": {"uniform": [4, 9]}},
        },
        "layouts": {"1p1d": [{"role": "prefill", "hardware": "l4"}, {"role": "decode", "hardware": "l4"}]},
        "policies": {"round_robin": "round_robin", "least_loaded": "least_loaded"},
        "rates": [2.5],
    }
    file.write_text(json.dumps(plan))
    out = folder / "out"
    out.mkdir(exist_ok=True)
    plainly = profile(1.0, 0.002)
    looked_at = tuple(point.model_copy(update={"loop_s": (LOOP_S,)}) for point in plainly.points)
    save_instance_profile(plainly.model_copy(update={"points": looked_at}), out / "profile-1.json")
    base = {
        **plan["experiment"],
        "workload": {**plan["experiment"]["workload"], "rate": 2.5},
        "cluster": {"instances": plan["layouts"]["1p1d"]},
    }
    store = RunStore({}, {})
    for policy in plan["policies"]:
        result = simulate(Experiment.parse({**base, "policy": policy}))
        for k in (1, 2):
            own = {"cores": 2, "front_end_cpu_s": 1.0}
            store.put(StoredRun("1p1d", policy, 2.5, "real", k, measured(result, 1.05, run=own), loops))
            store.put(StoredRun("1p1d", policy, 2.5, "sim", k + 5, result))  # of a judgement before
    store.put(StoredRun("1p1d", "round_robin", 9, "real", 1, result))  # of a rate that is not asked for
    store.save(out)
    return validate(file, out, lambda line: None, again=True), RunStore.load(out)


@pytest.mark.parametrize("slow", [False, True])
def test_judging_again_starts_no_process_and_leaves_the_runs_of_both_worlds(
    slow: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("subprocess.Popen", lambda *args, **options: pytest.fail("a process was started"))
    outcome, store = judged_again(tmp_path, [[2 * LOOP_S] * 8, [LOOP_S] * 8] if slow else [])
    names = [f"1p1d-{policy}-2.5" for policy in ("round_robin", "least_loaded")]
    simulated = ("sim", "sim-1", "sim-2") if slow else ("sim",)
    worlds = ("real-1", "real-2", *simulated)
    assert list(store.runs) == [*(f"{name}-{world}" for name in names for world in worlds), "1p1d-round_robin-9-real-1"]
    assert bool(store.runs[f"{names[0]}-{simulated[-1]}"].result.experiment["faults"]) == slow
    assert store.runs[f"{names[0]}-sim"].result.experiment["faults"] == []
    assert [plain(check) for check in outcome.checks] == store.checks and len(store.checks) == 12
    assert (outcome.undisturbed == outcome.checks) == (not slow)
    assert outcome.comparisons.keys() == {"1p1d, 2.5 req/s"}


def test_a_measured_run_that_is_missing_is_named(tmp_path: Path) -> None:
    judged_again(tmp_path, [])
    plan = json.loads((tmp_path / "plan.yaml").read_text())
    (tmp_path / "plan.yaml").write_text(json.dumps({**plan, "repeats": 3}))
    with pytest.raises(UsageError, match=r"no measured run 3 of 1p1d, round_robin, 2.5 req/s is there: leave out --again"):
        validate(tmp_path / "plan.yaml", tmp_path / "out", lambda line: None, again=True)


@pytest.mark.slow
def test_a_small_run_goes_through_from_calibration_to_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import yaml

    plan = read_yaml(EXPERIMENTS / "two_worlds.yaml", TWO_WORLDS)
    plan["experiment"]["workload"]["requests"] = 12
    plan["experiment"]["base_dir"] = str(EXPERIMENTS)
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump({**plan, "repeats": 1, "calibrate_s": 10}))
    with pytest.raises(SystemExit) as ended:
        main(["validate", str(file), "--out", str(tmp_path / "out")])
    assert ended.value.code in (0, 1, None)
    said = capsys.readouterr().out
    assert "of 24 figures are within their bar" in said
    assert "of all cores, from the engines" in said
    out = tmp_path / "out"
    made = {path.name for path in out.iterdir()}
    assert made >= {"profile.json", "profile-2.json", "compare-1.html", "table.md", "manifest.json", "requests.parquet"}
    assert not [path for path in out.iterdir() if path.is_dir()]
    store = RunStore.load(out)
    assert {"2mixed-prefix_aware-2.5-sim", "1p1d-round_robin-2.5-real-1"} <= store.runs.keys()
    seen = store.runs["1p1d-round_robin-2.5-real-1"].loop_s
    assert store.machine["cores"] and set(store.versions) == {"pdlab", "torch", "python"}
    assert len(load_checks(out)) == 24
    first = store.runs["2mixed-round_robin-2.5-real-1"].result.records.frame().sort_values("arrival_s").iloc[0]
    assert first.prefill_instance == "mixed-0", "as in the simulation"
    with pytest.raises(SystemExit):
        main(["validate", str(file), "--out", str(tmp_path / "out"), "--again"])
    assert capsys.readouterr().out.splitlines()[-8:-4] == said.splitlines()[-8:-4]
    assert len(seen) == 2 and all(len(loops) > 4 for loops in seen)
