"""What the instances of `--role all` are started with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pdlab import cost
from pdlab.core.types import Role, UsageError
from pdlab.experiment.deployment import Deployment
from pdlab.experiment.experiment import Experiment
from pdlab.real.engine.messages import Ready
from pdlab.real.instance.member import measured_of
from pdlab.real.launch.asked import Asked
from pdlab.real.launch.ignored_keys import ignored
from pdlab.real.launch.instance import Listening
from pdlab.real.launch.serve import check, child_command, engine_of, profile_of, settled
from pdlab.sim.plans import plans
from tests.cost.test_measured import PROFILE


def asked(folder: Path, name: str, role: str, registry: str = "fd://3") -> Asked:
    def row(role: str, count: int, kv_blocks: int) -> dict[str, Any]:
        return {"role": role, "count": count, "hardware": "l4", "engine": {"kv_blocks": kv_blocks}}

    experiment = Experiment.parse(
        {
            "model": "smollm2-135m",
            "engine": {"kv_blocks": 100},
            "workload": {"source": "azure-conv-2023", "requests": 1, "rate": 1.0},
            "cluster": {"instances": [row("prefill", 1, 500), row("decode", 1, 600), row("decode", 1, 700)]},
        }
    )
    return Asked(
        role=role, file=None, deployment=experiment, given={"model": folder}, serving=Listening(), registry=registry, instance_name=name
    )


@pytest.mark.parametrize(
    ("name", "role", "kv_blocks"),
    [("prefill-0", "prefill", 500), ("decode-1", "decode", 700), ("decode-2", "decode", 600), ("mixed-0", "mixed", 500)],
)
def test_one_that_is_scaled_up_is_like_the_first_of_its_role(name: str, role: str, kv_blocks: int, tmp_path: Path) -> None:
    assert engine_of(asked(tmp_path, name, role)).kv_blocks == kv_blocks


def test_one_that_is_started_by_hand_is_the_one_of_its_name(tmp_path: Path) -> None:
    assert engine_of(asked(tmp_path, "decode-1", "decode", "etcd://host:1")).kv_blocks == 700
    assert engine_of(asked(tmp_path, "mine", "prefill", "etcd://host:1")).kv_blocks == 500, "all of its role are alike"
    assert engine_of(asked(tmp_path, "mine", "mixed", "etcd://host:1")).kv_blocks == 100, "there is none of its role"
    with pytest.raises(UsageError, match="instances of role decode differ: say with --instance-name which it is"):
        engine_of(asked(tmp_path, "mine", "decode", "etcd://host:1"))


def served(role: str, keys: Mapping[str, Any], **more: Any) -> Asked:
    mapping = {"model": "m", "cluster": {"instances": [{"role": "prefill"}, {"role": "decode", "count": 2}]}, **keys}
    given = {"model": str(Path(__file__).parent), **more.pop("given", {})}
    return Asked(role=role, file=Path("x.yaml"), deployment=Deployment.parse(mapping), given=given, serving=Listening(), **more)


def test_an_option_goes_before_the_files_key() -> None:
    keys = {"device": "cuda", "dtype": "bfloat16", "quantization": "wint4", "registry": "redis://file:1"}
    file, option = served("prefill", keys), served("prefill", keys, given={"device": "npu", "dtype": "float32", "quantization": "wint8"})
    assert [(o.device, o.dtype, o.quantization) for o in map(engine_of, (file, option))] == [
        ("cuda", "bfloat16", "wint4"),
        ("npu", "float32", "wint8"),
    ]
    assert settled(file).registry == "redis://file:1"
    assert settled(served("prefill", keys, registry="etcd://option:1")).registry == "etcd://option:1"
    assert settled(served("all", keys)).registry == ""


def test_a_row_says_what_its_kv_is_kept_in_and_how_its_experts_are_shared_out() -> None:
    rows = [{"role": "prefill", "tp": 4, "ep": 2}, {"role": "decode", "tp": 4, "ep": 4, "engine": {"kv_cache_dtype": "fp8"}}]
    keys = {"cluster": {"instances": rows}, "engine": {"kv_cache_dtype": "bfloat16"}, "registry": "redis://a"}

    def found(role: str, **given: Any) -> tuple[str, int, int]:
        options = engine_of(served(role, keys, given=given))
        return options.kv_cache_dtype, options.tp, options.ep

    assert [found(role) for role in ("prefill", "decode")] == [("bfloat16", 4, 2), ("fp8", 4, 4)]
    assert found("decode", kv_cache_dtype="auto", tp=2) == ("auto", 2, 2), "spread whole, over whatever ranks there are"
    assert found("prefill", tp=8) == ("bfloat16", 8, 2)
    assert found("prefill", enable_expert_parallel=True) == ("bfloat16", 4, 4)
    check(served("prefill", keys))


def test_the_files_registry_takes_the_password_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDLAB_REGISTRY_PASSWORD", "s/e")
    assert settled(served("prefill", {"registry": "redis://me@file:1"})).registry == "redis://me:s%2Fe@file:1"


PP = {"cluster": {"instances": [{"role": "prefill"}, {"role": "decode", "pp": 4}]}}


@pytest.mark.parametrize(
    ("role", "more"),
    [
        ("all", {}),
        ("mixed", {}),
        ("decode", {"registry": "redis://a"}),
        ("prefill", {"instance_name": "decode-0", "registry": "redis://a"}),
    ],
)
def test_ranks_of_other_kinds_are_refused(role: str, more: dict[str, Any]) -> None:
    line = "x.yaml: cluster.instances.1.pp: 4, but pdlab's engine splits a model by tp alone: write pp: 1, or start a vLLM server"
    with pytest.raises(UsageError) as caught:
        check(served(role, PP, **more))
    assert str(caught.value).startswith(line)


@pytest.mark.parametrize(
    ("role", "more"),
    [("prefill", {}), ("router", {}), ("decode", {"engine": "vllm", "upstream": "http://v"})],
)
def test_but_not_where_somebody_else_has_it(role: str, more: dict[str, Any]) -> None:
    check(served(role, PP, registry="redis://a", **more))


def test_all_needs_instances() -> None:
    with pytest.raises(UsageError, match=r"its cluster\.instances say what to start"):
        check(served("all", {"cluster": {"instances": []}}))


STUDY = {"workload": {"source": "azure-conv-2023"}, "faults": [], "cost": {}}
PUSH = {"transfer": {"mode": "push"}}


@pytest.mark.parametrize(
    ("role", "keys", "more", "line"),
    [
        ("all", {}, {}, ""),
        ("router", STUDY, {}, "since they are the simulator's: workload, faults, cost"),
        (
            "prefill",
            {"cluster": {"instances": [{"role": "prefill", "host": "a"}, {"role": "decode", "host": "b"}], "network": {}}},
            {"registry": "redis://a"},
            "since they are the simulator's: cluster.instances.host, cluster.network",
        ),
        ("mixed", {"policy": "random", "slo": {"ttft_s": 2.0}}, {}, "since one server is no cluster: cluster.instances, policy, slo"),
        (
            "mixed",
            {"cluster": {"instances": [{"role": "mixed"}], "autoscale": {}}},
            {},
            "since one server is no cluster: cluster.autoscale",
        ),
        ("all", {"registry": "redis://a"}, {}, "since --role all keeps its own in memory: registry"),
        (
            "prefill",
            {"dtype": "float16", "engine": {"max_seqs": 3}},
            {"registry": "redis://a", "engine": "vllm"},
            "since the server at --upstream has its own: dtype, engine",
        ),
        (
            "all",
            {"engine": {"hbm_utilization": 0.5}},
            {},
            "since engine.kv_blocks says it where there is only a CPU: engine.hbm_utilization",
        ),
        ("all", {"engine": {"hbm_utilization": 0.5}, "device": "cuda"}, {}, ""),
        ("all", {"engine": {"hbm_utilization": 0.5}}, {"given": {"device": "cuda"}}, ""),
        ("router", PUSH, {}, ""),
        ("router", {"transfer": {"mode": "push", "reserve": "before_prefill"}}, {}, ""),
        ("router", {"transfer": {"mode": "push", "granularity": "layer"}}, {}, ""),
        ("router", {**PUSH, "policy": "xllm_slo_aware"}, {}, ""),
        (
            "router",
            {"cost": {}, **PUSH},
            {},
            "since they are the simulator's: cost",
        ),
    ],
)
def test_what_is_not_used_is_named_in_a_line(role: str, keys: dict[str, Any], more: dict[str, Any], line: str) -> None:
    assert ignored(served(role, keys, **more)) == (f"serve: ignored, {line}" if line else "")


def of_a_profile(folder: Path, **rest: Any) -> Asked:
    """An instance whose row says what was measured of it."""
    cost.save_instance_profile(PROFILE, folder / "profile.json")
    experiment = Experiment.parse(
        {
            "model": "smollm2-135m",
            "engine": {"kv_blocks": 100, "max_batch_tokens": 512, "max_seqs": 16},
            "workload": {"source": "azure-conv-2023", "requests": 1, "rate": 1.0},
            "cluster": {"instances": [{"role": "prefill", "hardware": str(folder / "profile.json")}, {"role": "decode", "hardware": "l4"}]},
        }
    )
    options = {"role": "prefill", "file": None, "given": {}, "serving": Listening(), "registry": "fd://3", "instance_name": "prefill-0"}
    return Asked(deployment=experiment, **{**options, **rest})


def test_where_the_row_has_a_profile_predictors_start_from_what_the_simulator_starts_from(tmp_path: Path) -> None:
    asked = of_a_profile(tmp_path)
    assert isinstance(asked.deployment, Experiment)
    plan = plans(asked.deployment, 16)[0]
    ready = Ready("", 1000, 100, 16, 100, "", "", prefill_profile=((1, 9.9),))
    live = measured_of(ready, profile_of(asked), max_batch_tokens=512, max_seqs=16)
    assert len(live.prefill_profile) > 3 and len(live.decode_profile) > 3
    assert (live.prefill_profile, live.decode_profile) == (plan.prefill_profile, plan.decode_profile)


def test_who_has_no_profile_measures_itself_unless_told_not_to(tmp_path: Path) -> None:
    assert not engine_of(of_a_profile(tmp_path, given={"model": ""})).self_profile
    assert engine_of(of_a_profile(tmp_path, role="decode", instance_name="decode-0", given={"model": ""})).self_profile
    unwilling = of_a_profile(tmp_path, role="decode", instance_name="decode-0", self_profile=False)
    assert not engine_of(unwilling).self_profile
    assert "--no-self-profile" in child_command(unwilling, "m", 1, "decode-0", Role.DECODE, 3)
    assert "--no-self-profile" not in child_command(of_a_profile(tmp_path), "m", 1, "decode-0", Role.DECODE, 3)


def test_another_model_than_the_files_is_measured_anew(tmp_path: Path) -> None:
    assert profile_of(of_a_profile(tmp_path)) is not None
    assert profile_of(of_a_profile(tmp_path, given={"model": "mine"})) is None


@pytest.mark.parametrize(("held", "word"), [(True, "--prefix-cache"), (False, "--no-prefix-cache"), (None, "")])
def test_what_the_command_line_says_of_engines_goes_to_the_children(held: bool | None, word: str, tmp_path: Path) -> None:
    whole = served("all", {}, given={"prefix_cache": held, "batching": "prefill_first"})
    words = child_command(whole, "m", 1, "decode-0", Role.DECODE, 3)
    assert words[words.index("--batching") + 1] == "prefill_first"
    assert [one for one in words if one.endswith("prefix-cache")] == ([word] if word else [])
    options = engine_of(served("mixed", {}, given={"prefix_cache": held, "batching": "prefill_first"}))
    assert (options.prefix_cache, options.batching) == (held is not False, "prefill_first")


@pytest.mark.parametrize("role", ["router", "all"])
def test_a_routers_requests_have_the_time_that_the_command_line_gives(role: str) -> None:
    registry = "etcd://host:1" if role == "router" else ""
    found = settled(served(role, {"limits": {"request_timeout_s": 5.0, "lease_s": 7.0}}, registry=registry, request_timeout_s=9000.0))
    assert found.deployment is not None
    assert (found.deployment.limits.request_timeout_s, found.deployment.limits.lease_s) == (9000.0, 7.0)
    plain = settled(
        Asked(role="router", file=None, deployment=None, given={}, serving=Listening(), registry="etcd://host:1", request_timeout_s=3.0)
    )
    assert plain.deployment is not None and plain.deployment.limits.request_timeout_s == 3.0
