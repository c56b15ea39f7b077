"""The experiment file: what it means, and what is said of a wrong one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from pdlab.core.types import Role, UsageError
from pdlab.experiment.experiment import Experiment
from pdlab.sim import simulate

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "experiments" / "quickstart.yaml"
PLAIN: dict[str, Any] = {
    "model": "llama-3.1-8b",
    "workload": {"source": "azure-conv-2023", "requests": 100, "rate": 4.0},
    "cluster": {"instances": [{"role": "prefill", "hardware": "h100-sxm"}, {"role": "decode", "count": 2, "hardware": "h100-sxm"}]},
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """PLAIN with the value at a dotted path replaced; None removes it."""
    result = copy.deepcopy(PLAIN)
    *steps, last = path.split(".")
    node: Any = result
    for step in steps:
        node = node[int(step)] if isinstance(node, list) else node.setdefault(step, {})
    if value is None:
        del node[last]
    else:
        node[last] = value
    return result


def lines(mapping: dict[str, Any]) -> list[str]:
    with pytest.raises(UsageError) as caught:
        Experiment.parse(mapping, "x.yaml")
    found = str(caught.value).split("\n")
    assert all(line.startswith("x.yaml: ") for line in found)
    assert "pydantic" not in str(caught.value)
    return [line.removeprefix("x.yaml: ") for line in found]


MISTAKES = [
    # a dotted path, its value, what is said
    ("modl", "opt-13b", "modl: unknown key; nearest is model"),
    ("zzz", 1, "zzz: unknown key; there are name, base_dir, seed, model,"),
    ("model", None, "model: is missing"),
    ("model", "llama-3.1-8x", "model: unknown model 'llama-3.1-8x': nearest are llama-3.1-8b,"),
    ("name", "a/b", "name: names the folder of the results, which cannot be 'a/b'"),
    ("seed", 1.5, "seed: must be a whole number, not 1.5"),
    ("seed", -1, "seed: must be at least 0, not -1"),
    ("seed", True, "seed: must be a number, not true"),
    ("cluster", 3, "cluster: must be a mapping, not 3"),
    ("cluster.instances", {"prefill": 2}, "cluster.instances: must be a list, not {'prefill': 2}"),
    ("cluster.instances.0.rol", "prefill", "cluster.instances.0.rol: unknown key; nearest is role"),
    (
        "cluster.instances.0.role",
        "prefil",
        "cluster.instances.0.role: 'prefil' is not one of prefill, decode, mixed, auto; nearest is prefill",
    ),
    ("cluster.instances.0.hardware", "h100-smx", "cluster.instances.0.hardware: unknown hardware 'h100-smx': nearest are h100-sxm,"),
    ("cluster.instances.0.hardware", None, "cluster.instances.0.hardware: is missing"),
    ("cluster.instances.1.count", "two", "cluster.instances.1.count: must be a whole number, not 'two'"),
    ("cluster.instances.1.count", 0, "cluster.instances.1.count: must be at least 1, not 0"),
    ("cluster.instances.1.count", True, "cluster.instances.1.count: must be a number, not true"),
    ("cluster.instances.1.tp", 3, "cluster.instances.1: tp 3 does not divide the 32 attention heads"),
    ("cluster.instances.1.prefill", 1, "cluster.instances.1: prefill is for role auto: remove it, or write role: auto in place of decode"),
    ("cluster.instances.0.name", "decode-1", "cluster.instances: two instances are named decode-1; give each row its own name"),
    ("cluster.network.gbytes_per_s", -1, "cluster.network.gbytes_per_s: must be above 0, not -1"),
    ("cluster.network.gbyte_per_s", 1, "cluster.network.gbyte_per_s: unknown key; nearest is gbytes_per_s"),
    ("cluster.network.intra_host.latency_us", "x", "cluster.network.intra_host.latency_us: must be a number, not 'x'"),
    ("cluster.reports.period_s", float("inf"), "cluster.reports.period_s: must be a finite number, not inf"),
    ("cluster.autoscale", {"enabled": True, "min": 5, "max": 4}, "cluster.autoscale: min 5 must not be above max 4"),
    (
        "engine.batching",
        "chunk",
        "engine.batching: 'chunk' is not one of chunked, decode_first, delayed, online_first, prefill_first, slide_batching; "
        "nearest is chunked",
    ),
    ("engine.watermark", 1, "engine.watermark: must be below 1, not 1"),
    ("engine.prefix_cache", "maybe", "engine.prefix_cache: must be true or false, not 'maybe'"),
    ("transfer.mode", "psh", "transfer.mode: 'psh' is not one of push, pull; nearest is push"),
    ("transfer.granularity", "layer", "transfer: granularity layer is for mode push: write granularity: request, or mode: push"),
    (
        "transfer",
        {"mode": "push", "reserve": "after_prefill"},
        "transfer: mode push writes to blocks that were set aside before prefill: write reserve: before_prefill, or mode: pull",
    ),
    ("policy", "prefix_awre", "policy: unknown policy 'prefix_awre' (did you mean prefix_aware or p2p_prefix?)"),
    ("policy", {"dispach": "random"}, "policy: unknown key 'dispach' (did you mean dispatch?)"),
    ("policy", {"name": "round_robin", "speed": 3}, "policy: round_robin has no parameter 'speed'"),
    ("policy", 3, "policy: must be text or a mapping, not 3"),
    ("slo.ttft_s", 0, "slo.ttft_s: must be above 0, not 0"),
    (
        "faults",
        [{"at_s": 1, "kill": "decode-9"}],
        "faults.0.kill: no instance is named 'decode-9'; there are prefill-0, decode-0, decode-1",
    ),
    ("faults", [{"at_s": 1, "kil": "decode-0"}], "faults.0.kil: unknown key; nearest is kill"),
    ("faults", [{"at_s": 1, "cut": ["decode-0", "x"]}], "faults.0.cut: no instance is named 'x'; there are prefill-0, decode-0, decode-1"),
    ("faults", [{"at_s": 1, "cut": ["decode-0", "decode-0"]}], "faults.0: cut names two instances, not decode-0 twice"),
    ("faults", [{"at_s": 1, "cut": ["decode-0", "decode-1"], "factor": 0.5}], "faults.0: cut takes no factor, only by_s and for_s"),
    ("limits.max_in_flight", 0, "limits.max_in_flight: must be at least 1, not 0"),
    (
        "faults",
        [{"at_s": 1}],
        "faults.0: a fault is one of kill, stop, drain, slow, slow_link, cut_link, cut, lose_reports, delay_reports, not none of them",
    ),
    ("faults", [{"at_s": 1, "slow_link": "decode-0"}], "faults.0: slow_link needs factor"),
    ("faults", [{"at_s": 1, "kill": "decode-0", "for_s": 3}], "faults.0: kill takes no for_s, only restart_after_s"),
    ("cost", {"roofline": 3}, "cost.roofline: must be text or a mapping, not 3"),
    ("cost", {"roofline": {"compute": 0.5}}, "cost.roofline.compute_8bit: is missing"),
    ("cost", {"tabel": "x.json"}, "cost.tabel: unknown key; nearest is table"),
    ("workload.rat", 3, "workload.rat: unknown key; nearest is rate"),
    ("workload.rate", -3, "workload.rate: must be above 0, not -3"),
]


@pytest.mark.parametrize(("path", "value", "said"), MISTAKES, ids=[f"{path}={value}"[:50] for path, value, _ in MISTAKES])
def test_a_mistake_is_told_by_place_and_remedy(path: str, value: Any, said: str) -> None:
    assert lines(changed(path, value))[0].startswith(said)


def test_each_mistake_has_a_line_of_its_own() -> None:
    wrong = changed("transfer.mode", "psh")
    wrong["cluster"]["instances"][0]["rol"] = "prefill"
    wrong["modl"] = "x"
    assert [line.split(":")[0] for line in lines(wrong)] == ["cluster.instances.0.rol", "transfer.mode", "modl"]


def test_a_model_that_does_not_fit_says_what_is_missing() -> None:
    for line in lines({**PLAIN, "model": "llama-3.1-70b"}):
        assert line.startswith("cluster.instances.")
        assert "GB missing" in line
        assert "smallest tp that fits is 2" in line


@pytest.mark.parametrize(
    ("workload", "block_tokens", "said"),
    [
        ({"source": "synthetic", "requests": 5, "rate": 1, "prompt": 9, "output": 2}, 12, "block_tokens 12 does not divide the 16 tokens"),
        ({"source": "mooncake-conversation"}, 48, "block_tokens 48 does not divide the 512 tokens"),
    ],
)
def test_blocks_that_do_not_divide_the_prefix_hashes(workload: dict[str, Any], block_tokens: int, said: str) -> None:
    for path in ("engine", "cluster.instances.1.engine"):
        (line,) = lines({**changed(path, {"block_tokens": block_tokens}), "workload": workload})
        assert line.startswith(f"engine.{said} behind one prefix hash of the workload; choose a divisor, such as ")
        assert workload_hash(line) % int(line.rpartition(" ")[2]) == 0


def workload_hash(line: str) -> int:
    return int(line.partition(" divide the ")[2].partition(" ")[0])


def test_what_the_file_does_not_tell_of_prefix_hashes_is_told_when_it_is_read() -> None:
    wide = Experiment.parse(changed("engine", {"block_tokens": 128}))  # as a server may have them
    with pytest.raises(UsageError, match=r"^engine\.block_tokens 128 does not divide the 16 tokens .* such as 16$"):
        simulate(wide)


def test_kv_blocks_given_by_hand_are_believed() -> None:
    Experiment.parse({**PLAIN, "model": "llama-3.1-70b", "engine": {"kv_blocks": 1000}})


@pytest.mark.parametrize(
    ("roles", "missing"),
    [(["decode"], ["prefill"]), (["prefill"], ["decode"]), ([], ["prefill", "decode"]), (["mixed"], []), (["prefill", "decode"], [])],
)
def test_somebody_must_prefill_and_somebody_decode(roles: list[str], missing: list[str]) -> None:
    mapping = changed("cluster.instances", [{"role": role, "hardware": "h100-sxm"} for role in roles])
    if missing:
        assert lines(mapping) == [f"cluster.instances: nobody can {role}; add an instance of role {role} or mixed" for role in missing]
    else:
        Experiment.parse(mapping)


@pytest.mark.parametrize("prefill", [0, 4, 5])
def test_a_ratio_that_leaves_nobody_for_one_role_is_refused(prefill: int) -> None:
    mapping = changed("cluster.instances", [{"role": "auto", "count": 4, "prefill": prefill, "hardware": "h100-sxm"}])
    assert lines(mapping) == [f"cluster.instances.0: prefill must be at least 1 and below count 4, so that some decode, not {prefill}"]


def test_instances_are_named_by_role_and_counted_through_all_rows() -> None:
    rows = [
        {"role": "auto", "count": 3, "prefill": 1, "hardware": "h100-sxm"},
        {"role": "prefill", "hardware": "a100-sxm-80gb", "tp": 2},
        {"role": "mixed", "name": "spare", "hardware": "h100-sxm", "host": "node-1", "nics": 2, "engine": {"max_seqs": 8}},
    ]
    placed = Experiment.parse({**changed("cluster.instances", rows), "engine": {"block_tokens": 32}}).placements()
    assert [(p.name, p.role) for p in placed] == [
        ("prefill-0", Role.PREFILL),
        ("decode-0", Role.DECODE),
        ("decode-1", Role.DECODE),
        ("prefill-1", Role.PREFILL),
        ("spare", Role.MIXED),
    ]
    assert [p.nics for p in placed] == [1, 1, 1, 2, 2]
    assert [p.host for p in placed] == ["prefill-0", "decode-0", "decode-1", "prefill-1", "node-1"]
    assert [p.engine.max_seqs for p in placed] == [256, 256, 256, 256, 8]
    assert {p.engine.block_tokens for p in placed} == {32}


def test_the_decode_instance_reserves_first_where_sending_starts_first() -> None:
    def reserves(**transfer: str) -> bool:
        return Experiment.parse({**PLAIN, "transfer": transfer}).transfer.reserve_first

    assert not reserves()
    assert reserves(mode="push", granularity="layer")
    assert reserves(mode="pull", reserve="before_prefill")
    assert reserves(mode="push", granularity="request")
    assert not reserves(mode="pull", reserve="after_prefill")


def test_a_resolved_experiment_is_the_same_experiment_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{**PLAIN["cluster"]["instances"][0], "engine": {"batching": "prefill_first"}}, PLAIN["cluster"]["instances"][1]]
    policy = tmp_path / "mine.py"
    policy.write_text("from pdlab import Policy\n\n\nclass Mine(Policy):\n    def dispatch(self, request, cluster):\n        return None\n")
    first = tmp_path / "first.yaml"
    first.write_text(yaml.safe_dump({**changed("cluster.instances", rows), "policy": {"dispatch": "mine.py:Mine"}}))
    experiment = Experiment.load(first)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    Path("second.yaml").write_text(experiment.to_yaml())
    again = Experiment.load("second.yaml")
    assert again.resolved() == experiment.resolved()
    assert again.placements() == experiment.placements()


def test_the_file_gives_its_name_and_folder(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(PLAIN))
    experiment = Experiment.load(tmp_path / "mine.yaml")
    assert (experiment.name, experiment.base_dir) == ("mine", tmp_path)


def test_an_experiment_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Experiment.parse(PLAIN).seed = 3  # type: ignore[misc]


def test_overrides_replace_values_by_path() -> None:
    overrides = ["workload.rate=1e1", "cluster.instances.1.count=3", "policy={name: power_of_two}", "slo.tpot_s=0.1", "transfer.mode=push"]
    experiment = Experiment.load(QUICKSTART, overrides)
    assert experiment.cluster.instances[1].count == 3
    assert experiment.policy == {"name": "power_of_two"}
    assert (experiment.slo.ttft_s, experiment.slo.tpot_s) == (1.0, 0.1)
    assert experiment.resolved()["workload"]["rate"] == 10.0


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("rate", "--set rate: write key.path=value"),
        ("=3", "--set =3: write key.path=value"),
        ("a..b=3", "--set a..b=3: write key.path=value"),
        ("cluster.instances.7.count=3", "--set cluster.instances.7.count=3: 7 is not an index into a list of 2 (0 to 1)"),
        ("cluster.instances.one.count=3", "--set cluster.instances.one.count=3: one is not an index"),
        ("seed.deep=3", "--set seed.deep=3: there is no deep in 7, which is not a mapping"),
        ("seed=[1", "--set seed=[1:"),
        ("workload.rats=3", f"{QUICKSTART}: workload.rats: unknown key; nearest is rate"),
        ("limts.max_attempts=3", f"{QUICKSTART}: limts: unknown key; nearest is limits"),
    ],
)
def test_a_wrong_override_says_which(override: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        Experiment.load(QUICKSTART, [override])
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "an experiment is a mapping of keys to values, not an empty file"),
        ("- 1\n- 2\n", "an experiment is a mapping of keys to values, not [1, 2]"),
        ("model: x\nmodel: y\n", "line 2, column 1: key 'model' is there twice"),
        ("a: 1\nb: {c: 2\nd: 3\n", "line 3, column 2: "),
        ("a: 1\n\tb: 2\n", "line 2, column 1: found character '\\t'"),
    ],
)
def test_what_is_not_yaml_is_told_by_line_and_column(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        Experiment.load(file)
    assert str(caught.value).startswith(f"{file}: {said}")
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_a_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.yaml: No such file or directory"):
        Experiment.load(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not a text file"):
        Experiment.load(tmp_path / "binary.yaml")


def models(kind: Any = Experiment) -> Iterator[type[BaseModel]]:
    """Every pydantic model that an experiment is made of."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind
        for field in kind.model_fields.values():
            yield from models(field.annotation)
    else:
        for inner in getattr(kind, "__args__", ()):
            yield from models(inner)


@pytest.mark.parametrize("spec", sorted(set(models()), key=lambda spec: spec.__name__), ids=lambda spec: spec.__name__)
def test_every_key_is_documented(spec: type[BaseModel]) -> None:
    text = (ROOT / "docs" / "reference" / "experiment-file.md").read_text(encoding="utf-8")
    assert not [key for key in spec.model_fields if f"`{key}`" not in text]
