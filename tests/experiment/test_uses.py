"""Which world uses which key: the table of the docs is the models' own, and what it says is so. A key that a world uses changes what comes
of it there; one that it does not use changes nothing, and is named.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import BaseModel

from pdlab import Experiment, UsageError, simulate
from pdlab.cost import save_instance_profile, save_profile
from pdlab.cost.table import DecodeGrid, PrefillGrid, Profile
from pdlab.experiment import make_router as control
from pdlab.experiment.cluster import EngineSpec
from pdlab.experiment.deployment import Deployment
from pdlab.experiment.fields import Use, nested, use_of
from pdlab.experiment.yaml import replaced
from pdlab.real.launch import serve as start
from pdlab.real.launch.asked import Asked
from pdlab.real.launch.ignored_keys import ignored
from pdlab.real.launch.instance import Listening
from pdlab.real.net.wire import StreamEvent
from pdlab.real.router.legs import push_to, relay_of
from pdlab.replay.log import head_of
from pdlab.sim.outcome import rests_on
from tests.cost.test_measured import PROFILE

BASE: dict[str, Any] = {
    "model": "llama-3.1-8b",
    "seed": 7,
    "workload": {"source": "synthetic", "requests": 40, "rate": 20.0, "prompt": {"uniform": [300, 900]}, "output": 40},
    "cluster": {
        "instances": [{"role": "prefill", "count": 2, "hardware": "h100-sxm"}, {"role": "decode", "count": 2, "hardware": "h100-sxm"}]
    },
}
SWITCHES = """\
from pdlab import Policy, Role, Scale


class Switches(Policy):
    tick_s = 0.2

    def resize(self, cluster):
        ready = [x for x in cluster.prefill if x.role is Role.PREFILL]
        return [(ready[-1], Role.DECODE)] if len(ready) > 1 and 0.5 < cluster.now < 1.0 else []


class Grows(Policy):
    tick_s = 0.2

    def resize(self, cluster):
        return [Scale(1 if cluster.now < 1.0 else -1, Role.DECODE)]
"""
SESSIONS = {**BASE["workload"], "sessions": {"turns": 4, "think_s": 0.1, "system_prompt_tokens": 512}}
TRACE = {"source": "mine.csv", "columns": {"arrival_s": "when", "prompt_tokens": "asked", "output_tokens": "answer"}, "time_unit": "s"}
SLOW = {"cluster.network": {"gbytes_per_s": 0.5}}
SILENT = {
    "faults": [{"at_s": 0.3, "lose_reports": "prefill-0"}],
    "limits": {"lease_s": 0.4, "probe_s": 0.1, "suspect_s": 0.2},
    "workload.requests": 100,
}
APART = [{"role": "prefill", "hardware": "h100-sxm"}]  # of two decode instances, one may be near
APART += [{"role": "decode", "hardware": "h100-sxm", "rack": f"r{k}", "zone": f"z{k}"} for k in (1, 2)]
FAR: dict[str, Any] = {"cluster": {"instances": APART}, "policy": "topology"}
KILLED = {"faults": [{"at_s": 0.3, "kill": "decode-0", "restart_after_s": 1.0}], "workload.requests": 100}
ALL_DEAD = [{"at_s": 0.3, "kill": f"{role}-{k}", "restart_after_s": 1.0} for role in ("prefill", "decode") for k in (0, 1)]
ROW = "cluster.instances.0"
# Key -> (another value, what has to be there besides). A row's engine takes what `engine` takes.
NGRAM = {"method": "ngram", "tokens": 1}
BY_MODEL = {"method": "draft_model", "tokens": 1, "model": "qwen3-0.6b"}
SIMULATED: dict[str, tuple[Any, Mapping[str, Any]]] = {
    "name": ("other", {}),
    "base_dir": ("other", {"policy": "mine.py"}),
    "seed": (8, {}),
    "model": ("qwen3-8b", {}),
    "dtype": ("float32", {}),
    "quantization": ("wint4", {}),
    "policy": ("round_robin", {}),
    "workload.source": ("azure-conv-2023", {"workload": {"source": "azure-code-2023", "requests": 40}}),
    "workload.format": ("mooncake", {"workload": TRACE}),
    "workload.columns": ({**TRACE["columns"], "output_tokens": "asked"}, {"workload": TRACE}),  # type: ignore[dict-item]
    "workload.time_unit": ("ms", {"workload": TRACE}),
    "workload.requests": (30, {}),
    "workload.duration_s": (1.0, {}),
    "workload.rate": (10.0, {}),
    "workload.arrival": ("constant", {}),
    "workload.prompt": (500, {}),
    "workload.output": (50, {}),
    "workload.max_prompt_tokens": (600, {}),
    "workload.max_output_tokens": (20, {}),
    "workload.sessions": ({"turns": 3}, {}),
    "workload.hash_tokens": (64, {"workload": SESSIONS}),
    "workload.priorities": ({0: 0.5, 1: 0.5}, {}),
    "workload.ttft_slo_s": (0.001, {}),
    "workload.tpot_slo_s": (0.0001, {}),
    "workload.tenants": ({1: 0.5, 2: 0.5}, {"policy": "consistent_hash", "cluster.instances.0.count": 3}),
    "workload.offline": (0.5, {"policy": "apart.py", "cluster.instances.0.count": 3}),
    "workload.n": (2, {}),
    "workload.best_of": (3, {}),
    "faults.at_s": ([{"at_s": 0.8, "kill": "decode-0"}], {"faults": [{"at_s": 0.3, "kill": "decode-0"}]}),
    "faults.kill": ([{"at_s": 0.3, "kill": "prefill-0"}], {"faults": [{"at_s": 0.3, "kill": "decode-0"}]}),
    "faults.stop": ([{"at_s": 0.3, "stop": "prefill-0", "for_s": 0.5}], {}),
    "faults.drain": ([{"at_s": 0.3, "drain": "prefill-0"}], {}),
    "faults.slow": ([{"at_s": 0.3, "slow": "prefill-0", "factor": 0.1}], {}),
    "faults.slow_link": ([{"at_s": 0.3, "slow_link": "prefill-0", "factor": 0.01}], {}),
    "faults.cut_link": ([{"at_s": 0.3, "cut_link": "prefill-0", "for_s": 0.5}], {}),
    "faults.cut": ([{"at_s": 0.3, "cut": ["prefill-0", "decode-0"], "for_s": 1.0}], {}),
    "faults.lose_reports": ([{"at_s": 0.3, "lose_reports": "prefill-0"}], SILENT | {"faults": []}),
    "faults.delay_reports": ([{"at_s": 0.3, "delay_reports": "prefill-0", "by_s": 3.0}], SILENT | {"faults": []}),
    "faults.restart_after_s": ([{"at_s": 0.3, "kill": "decode-0", "restart_after_s": 0.1}], KILLED),
    "faults.factor": ([{"at_s": 0.3, "slow": "prefill-0", "factor": 0.1}], {"faults": [{"at_s": 0.3, "slow": "prefill-0", "factor": 0.5}]}),
    "faults.decode_factor": (
        [{"at_s": 0.3, "slow": "decode-0", "factor": 0.5, "decode_factor": 0.1}],
        {"faults": [{"at_s": 0.3, "slow": "decode-0", "factor": 0.5}]},
    ),
    "faults.by_s": (
        [{"at_s": 0.3, "delay_reports": "prefill-0", "by_s": 0.1}],
        SILENT | {"faults": [{"at_s": 0.3, "delay_reports": "prefill-0", "by_s": 3.0}]},
    ),
    "faults.for_s": (
        [{"at_s": 0.3, "slow": "prefill-0", "factor": 0.1, "for_s": 0.2}],
        {"faults": [{"at_s": 0.3, "slow": "prefill-0", "factor": 0.1}]},
    ),
    "cost.roofline": ("h100-trtllm", {}),
    "cost.table": ("table.json", {"engine.kv_blocks": 4000}),
    "cost.fitted": (
        {"prefill": {"base_s": 0.01, "s_per_token": 1e-4}, "decode": {"base_s": 0.02, "s_per_token": 1e-6}},
        {},
    ),
    "cost.extrapolate": (True, {"cost.table": "short.json"}),
    "cost.weight_dtype": ("fp8", {}),
    "cost.kv_dtype": ("fp8", {}),
    "cost.factors": ({"decode": 1.5}, {}),
    "cluster.instances.role": ("mixed", {}),
    "cluster.instances.count": (3, {}),
    "cluster.instances.prefill": (1, {ROW: {"role": "auto", "count": 3, "prefill": 2, "hardware": "h100-sxm"}}),
    "cluster.instances.hardware": ("a100-sxm-80gb", {}),
    "cluster.instances.tp": (2, {}),
    "cluster.instances.dp_attention": (2, {f"{ROW}.tp": 2}),
    "cluster.instances.ep": (2, {f"{ROW}.tp": 2, "model": "gpt-oss-20b"}),
    "cluster.instances.pp": (2, {}),
    "cluster.instances.name": ("mine", {}),
    "cluster.instances.host": ("here", {"cluster.instances.1.host": "here", **SLOW}),
    "cluster.instances.rack": ("r2", {**FAR, **{f"cluster.instances.{k}.zone": "z" for k in range(3)}}),
    "cluster.instances.zone": ("z2", FAR),
    "cluster.instances.nics": (4, {"cluster.instances.1.nics": 4, **SLOW}),
    "cluster.network.gbytes_per_s": (0.1, {}),
    "cluster.network.latency_us": (1e5, {}),
    "cluster.network.transport": ("mooncake-roce", {}),
    "cluster.network.intra_host.gbytes_per_s": (0.1, {f"{ROW}.host": "here", "cluster.instances.1.host": "here"}),
    "cluster.network.intra_host.latency_us": (1e5, {f"{ROW}.host": "here", "cluster.instances.1.host": "here"}),
    "cluster.reports.period_s": (0.05, {}),
    "cluster.reports.delay_s": (0.4, {"policy": "llumnix", "cluster.reports.period_s": 0.05, "workload.rate": 100.0}),
    "cluster.role_switch_s": (3.0, {"policy": "mine.py:Switches"}),
    "cluster.detect_s": (0.05, KILLED),
    "cluster.autoscale.enabled": (True, {"policy": "mine.py:Grows"}),
    "cluster.autoscale.min": (4, {"policy": "mine.py:Grows", "cluster.autoscale": {"enabled": True, "start_s": 0.1}}),
    "cluster.autoscale.max": (5, {"policy": "mine.py:Grows", "cluster.autoscale": {"enabled": True, "start_s": 0.1}}),
    "cluster.autoscale.start_s": (0.5, {"policy": "mine.py:Grows", "cluster.autoscale": {"enabled": True, "start_s": 0.1}}),
    "engine.kv_cache_dtype": ("fp8", {}),
    "engine.block_tokens": (8, {}),
    "engine.max_batch_tokens": (128, {}),
    "engine.max_seqs": (1, {}),
    "engine.batching": ("prefill_first", {ROW: {"role": "mixed", "hardware": "h100-sxm"}, "cluster.instances.1.role": "mixed"}),
    "engine.prefix_cache": (False, {"workload": SESSIONS}),
    "engine.like": ("sglang", {}),
    "engine.version": ("0.6.1", {}),
    "engine.speculation.method": ("ngram", {"engine.speculation": {"tokens": 1}}),
    "engine.speculation.tokens": (3, {"engine.speculation": {"tokens": 1}}),
    "engine.speculation.acceptance": (0.2, {"engine.speculation": NGRAM}),
    "engine.speculation.model": ("qwen3-14b", {"model": "qwen3-8b", "engine.speculation": BY_MODEL}),
    "engine.watermark": (0.6, {"engine.kv_blocks": 150}),
    "engine.kv_blocks": (150, {}),
    "engine.hybrid_kv": (False, {"model": "gpt-oss-20b"}),
    "engine.hbm_utilization": (0.5, {}),
    "engine.max_model_len": (600, {}),
    "transfer.mode": ("push", {**SLOW, "transfer.reserve": "before_prefill"}),
    "transfer.granularity": ("layer", {**SLOW, "transfer.mode": "push"}),
    "transfer.reserve": ("before_prefill", {"engine.kv_blocks": 150}),
    "transfer.first_token": ("decode", SLOW),
    "transfer.response_path": ("via_prefill", SLOW),
    "transfer.timeout_s": (0.001, SLOW),
    "slo.ttft_s": (0.02, {}),
    "slo.tpot_s": (0.001, {}),
    "limits.request_timeout_s": (0.01, {}),
    "limits.max_attempts": (1, {"faults": [{"at_s": at_s, "kill": "decode-0", "restart_after_s": 0.1} for at_s in (0.3, 0.9, 1.5)]}),
    "limits.lease_s": (30.0, SILENT),
    "limits.probe_s": (30.0, SILENT),
    "limits.suspect_s": (30.0, SILENT),
    "limits.max_in_flight": (3, {}),
    "limits.grace_s": (5.0, {"faults": ALL_DEAD, "cluster.detect_s": 0.05}),
}  # fmt: skip
REFUSED = {"workload.format"}  # whose other value is an error with this file
RESCUED = {"cost.extrapolate", "cluster.autoscale.enabled"}  # whose value is one without it: a short table, a policy that scales


def leaves(model: type[BaseModel], where: str = "") -> Iterator[tuple[str, Use]]:
    """Every key of every mapping, a row's engine left out: it takes what `engine` takes."""
    for key, field in model.model_fields.items():
        below = nested(field) or (field.annotation if key in ("workload", "cost") else None)
        use = use_of(field)
        if below is None:
            yield where + key, use
        elif below is EngineSpec and where:
            assert use == Use()
        else:
            for path, inner in leaves(below, f"{where}{key}."):
                yield path, use if use != Use() else inner


# `plan` is neither world's: no simulation and no server reads it.
LEAVES = {path: use for path, use in leaves(Experiment) if not path.startswith("plan.")}


def in_file(path: str) -> str:
    """Where to put a key of a row."""
    return path.replace("cluster.instances.", f"{ROW}.") if path.startswith("cluster.instances.") else path


def mapping(path: str, folder: Path, other: bool) -> dict[str, Any]:
    """The base, what the key needs, and its other value."""
    value, besides = SIMULATED[path]
    made = replaced({**copy.deepcopy(BASE), "base_dir": str(folder)}, copy.deepcopy(dict(besides)))
    if other:
        value = str(folder / value) if path == "base_dir" else value
        made = replaced(made, {"faults" if path.startswith("faults.") else in_file(path): value})
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uses")
    (folder / "other").mkdir()
    (folder / "mine.py").write_text(f"{SWITCHES}\n\nclass Mine(Policy):\n    pass\n")
    (folder / "apart.py").write_text(
        "from pdlab import Policy\n\n\nclass Apart(Policy):\n    def dispatch(self, request, cluster):\n"
        "        return cluster.prefill[-1 if request.offline else 0]\n"
    )
    (folder / "other" / "mine.py").write_text(
        "from pdlab import Policy\n\n\nclass Mine(Policy):\n    def dispatch(self, request, cluster):\n        return cluster.prefill[0]\n"
    )
    (folder / "mine.csv").write_text("when,asked,answer\n" + "".join(f"{k / 10:.1f},{100 + k},{5 + k}\n" for k in range(30)))
    for name, most in (("table", 2000), ("short", 700)):
        prefill = PrefillGrid(tokens=(1, most), cached=(0, 1000), seconds=((0.01, 0.011), (0.05, 0.06)))
        decode = DecodeGrid(batch=(1, 64), context=(1, 2000), seconds=((0.02, 0.021), (0.03, 0.04)))
        save_profile(Profile(prefill=prefill, decode=decode), folder / f"{name}.json")
    save_instance_profile(PROFILE, folder / "measured.json")
    return folder


def test_every_key_that_a_simulation_uses_is_tried() -> None:
    assert set(SIMULATED) == {path for path, use in LEAVES.items() if use.sim}


def simulated(plain: dict[str, Any]) -> tuple[object, ...]:
    """What comes of it, and what a run says its seconds rest on."""
    experiment = Experiment.parse(plain)
    result = simulate(experiment)
    summary = {key: value for key, value in result.summary.items() if key != "run"}
    return result.name, json.dumps(summary, default=str), result.requests.to_json(), rests_on(experiment)


@pytest.mark.parametrize("path", SIMULATED)
def test_a_key_that_a_simulation_uses_changes_what_comes_of_it(path: str, folder: Path) -> None:
    try:
        before = simulated(mapping(path, folder, False))
    except UsageError:
        if path not in RESCUED:
            raise
        before = ()
    if path in REFUSED:
        with pytest.raises(UsageError):
            simulated(mapping(path, folder, True))
    else:
        assert simulated(mapping(path, folder, True)) != before


@pytest.mark.parametrize("key", [key for key in SIMULATED if key.startswith("engine.") and key not in REFUSED])
def test_a_rows_engine_is_used_as_the_files(key: str, folder: Path) -> None:
    before, plain = mapping(key, folder, False), mapping(key, folder, False)
    whole: dict[str, tuple[str, Any]] = {  # which a row has as a whole
        "engine.speculation.acceptance": ("engine.speculation", {**NGRAM, "acceptance": 0.2}),
        "engine.speculation.method": ("engine.speculation", NGRAM),
        "engine.speculation.model": ("engine.speculation", {**BY_MODEL, "model": "qwen3-14b"}),
    }
    path, value = whole.get(key, (key, SIMULATED[key][0]))
    for row in ("0", "1"):
        plain = replaced(plain, {f"cluster.instances.{row}.{path}": value})
    assert simulated(plain) != simulated(before)


OF_SERVE: dict[str, Any] = {
    "device": "cuda:1",
    "registry": "redis://host:1",
    f"{ROW}.device": "cuda:1",
    "engine.speculation.prompt_lookup_min": 2,
    "engine.speculation.prompt_lookup_max": 3,
}


@pytest.mark.parametrize("path", OF_SERVE)
def test_a_key_that_a_simulation_does_not_use_changes_nothing_and_is_named(path: str, folder: Path) -> None:
    assert {in_file(one) for one, use in LEAVES.items() if not use.sim} == set(OF_SERVE)
    plain = replaced({**copy.deepcopy(BASE), "base_dir": str(folder)}, {"engine.speculation": dict(NGRAM)})
    changed = replaced(plain, {path: OF_SERVE[path]})
    assert simulated(changed) == simulated(plain)
    assert Experiment.parse(plain).ignored == ""
    named = path.replace(".0.", ".")
    assert Experiment.parse(changed).ignored == f"sim: ignored, since they are for pdlab serve: {named}"


def test_a_plan_changes_nothing_in_a_simulation_and_is_named(folder: Path) -> None:
    plain = {**copy.deepcopy(BASE), "base_dir": str(folder)}
    changed = {**plain, "plan": {"tp": [1, 2]}}
    assert simulated(changed) == simulated(plain)
    assert Experiment.parse(changed).ignored == "sim: ignored, since it is for pdlab plan: plan"


# ---------------------------------------------------------------- live

# What is served has no catalogue to know a model by, and other keys are seen by other values.
SERVED: dict[str, tuple[Any, Mapping[str, Any]]] = {
    **{path: SIMULATED[path] for path, use in LEAVES.items() if use.sim and use.serve},
    "device": ("cuda:1", {}),
    "registry": ("redis://host:1", {}),
    "cluster.instances.device": ("cuda:1", {}),
    "cluster.instances.hardware": ("measured.json", {}),
    "engine.hbm_utilization": (0.5, {"device": "cuda"}),
    "engine.speculation.method": ("mtp", {"engine.speculation": NGRAM}),
    "engine.speculation.tokens": (3, {"engine.speculation": NGRAM}),
    "engine.speculation.model": ("qwen3-0.6b", {"engine.speculation": {"method": "draft_model", "tokens": 1, "model": "smollm2-135m"}}),
    "engine.speculation.prompt_lookup_min": (2, {"engine.speculation": NGRAM}),
    "engine.speculation.prompt_lookup_max": (3, {"engine.speculation": NGRAM}),
    "cluster.autoscale.enabled": (True, {}),
    "cluster.autoscale.min": (3, {"cluster.autoscale": {"enabled": True}}),
    "cluster.autoscale.max": (5, {"cluster.autoscale": {"enabled": True}}),
}


def served(plain: Mapping[str, Any]) -> tuple[object, ...]:
    """What `pdlab serve FILE --role all` and `--role prefill` are about to do, and what their router is made of."""
    deployment = Deployment.parse(plain)

    def asked(role: str, name: str, registry: str) -> Asked:
        how = Listening()
        return start.settled(
            Asked(
                role=role,
                file=Path("x.yaml"),
                deployment=deployment,
                given={"load_format": "dummy"},
                serving=how,
                registry=registry,
                instance_name=name,
            )
        )

    alone = asked("prefill", "", "")
    children = [asked(str(one.role), one.name, "fd://3") for one in deployment.placements()]
    whole = asked("all", "", "")
    start.check(whole)
    instances = [(start.engine_of(one), start._place(one)) for one in [*children, alone] if one.registry]
    router = control.router(deployment, hash_tokens=deployment.engine.block_tokens)
    prefill, decode = (
        SimpleNamespace(can=lambda _: True, spec=SimpleNamespace(engine="pdlab", url=url)) for url in ("http://p", "http://d")
    )
    head = head_of(deployment, router.policy, 16)
    return (
        alone.registry,
        [(one.name, one.role) for one in deployment.placements()],
        instances,
        (router.limits, router.pairs, router.first_token, router.autoscale, router.cluster.hash_tokens, router.cluster.rng.random()),
        (router.cluster.ttft_slo_s, router.cluster.tpot_slo_s, head.policy_hash, head.experiment["name"]),
        push_to(deployment.transfer, prefill, StreamEvent("reserved")),  # type: ignore[arg-type]
        relay_of(deployment.transfer, prefill, decode) is prefill,  # type: ignore[arg-type]
    )


def only_serves(plain: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in plain.items() if key not in ("workload", "faults", "cost")}


@pytest.mark.parametrize("path", SERVED)
def test_a_key_that_a_server_uses_changes_what_it_starts(path: str, folder: Path) -> None:
    assert set(SERVED) == {path for path, use in LEAVES.items() if use.serve}
    value, besides = SERVED[path]
    before = replaced({**only_serves(copy.deepcopy(BASE)), "base_dir": str(folder)}, copy.deepcopy(dict(besides)))
    value = str(folder / value) if path == "base_dir" else value
    after = replaced(before, {in_file(path): value})
    if path in ("cluster.instances.dp_attention", "cluster.instances.pp"):
        key = path.rsplit(".", 1)[1]
        with pytest.raises(UsageError, match=rf"x\.yaml: cluster\.instances\.0\.{key}: 2, but pdlab's engine splits a model by tp alone"):
            served(after)
    elif path == "engine.speculation.method":
        with pytest.raises(
            UsageError, match=r"x\.yaml: engine\.speculation: pdlab's engine drafts by method ngram or draft_model, not mtp"
        ):
            served(after)
    else:
        assert served(after) != served(before)


@pytest.mark.parametrize("path", [path for path, use in LEAVES.items() if not use.serve])
def test_a_key_that_a_server_does_not_use_changes_nothing_and_is_named(path: str, folder: Path) -> None:
    plain, changed = mapping(path, folder, False), mapping(path, folder, True)
    assert served(changed) == served(plain)
    deployment = Deployment.parse(changed)
    line = ignored(Asked(role="router", file=None, deployment=deployment, given={}, serving=Listening()))
    named = line.removeprefix("serve: ignored, since they are the simulator's: ").split(", ")
    assert any(path == one or path.startswith(f"{one}.") for one in named), line
