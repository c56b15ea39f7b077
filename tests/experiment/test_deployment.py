"""The experiment file as what runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pdlab import Experiment, UsageError
from pdlab.experiment.deployment import Deployment
from pdlab.experiment.experiment import read_back
from tests.experiment.test_spec import PLAIN

SERVED: dict[str, Any] = {"model": "some/folder", "cluster": {"instances": [{"role": "prefill"}, {"role": "decode", "count": 2}]}}


def said(mapping: dict[str, Any]) -> str:
    with pytest.raises(UsageError) as caught:
        Deployment.parse(mapping, "x.yaml")
    return str(caught.value)


def test_a_file_that_only_serves_needs_a_model_and_no_more() -> None:
    assert Deployment.parse({"model": "m.gguf"}).placements() == []
    assert [one.name for one in Deployment.parse(SERVED).placements()] == ["prefill-0", "decode-0", "decode-1"]
    assert said({}) == "x.yaml: model: is missing"


def test_what_the_study_says_need_not_be_right() -> None:
    wrong = {**SERVED, "workload": {"source": "nowhere", "rats": 3}, "cost": 7, "faults": [{"at_s": "soon"}]}
    wrong["cluster"] = {**SERVED["cluster"], "network": {"gbytes_per_s": -1}, "detect_s": "x", "reports": {"delay_s": "y", "period_s": 0.2}}
    deployment = Deployment.parse(wrong)
    assert deployment.cluster.reports.period_s == 0.2
    assert deployment.unread == ("workload", "cost", "faults", "cluster.network", "cluster.detect_s", "cluster.reports.delay_s")
    with pytest.raises(UsageError):
        Experiment.parse(wrong)


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"worklod": {}}, "worklod: unknown key; nearest is workload"),
        ({"engin": {}}, "engin: unknown key; nearest is engine"),
        (
            {"cluster": {"instances": [{"role": "mixed", "hardwear": "l4"}]}},
            "cluster.instances.0.hardwear: unknown key; nearest is hardware",
        ),
        ({"cluster": {"instances": [{"role": "decode"}]}}, "cluster.instances: nobody can prefill;"),
        ({"dtype": "fp8"}, "dtype: 'fp8' is not one of auto, float32, bfloat16, float16"),
        ({"quantization": "wint3"}, "quantization: 'wint3' is not one of wint8, wint4"),
        ({"device": "gpu"}, "device: "),
        ({"engine": {"dtype": "float32"}}, "engine.dtype: unknown key; pdlab's is dtype, at the top of the file"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype: unknown key; pdlab's is engine.kv_cache_dtype"),
        (
            {"dtype": "bfloat16", "engine": {"kv_cache_dtype": "float32"}},
            "engine.kv_cache_dtype: float32 is no narrower than dtype bfloat16, which is computed in: write auto, or a narrower one",
        ),
        ({"registry": "redis://me:secret@host"}, "registry: a password does not belong into a file: give it by PDLAB_REGISTRY_PASSWORD"),
        ({"policy": "prefix_awre"}, "policy: unknown policy 'prefix_awre'"),
    ],
)
def test_what_it_says_itself_is_checked(wrong: dict[str, Any], line: str) -> None:
    text = said({**SERVED, **wrong})
    assert text.startswith(f"x.yaml: {line}")
    assert "secret" not in text


def test_a_log_is_read_back_as_what_wrote_it(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(yaml.safe_dump({**PLAIN, "cluster": {**PLAIN["cluster"], "reports": {"delay_s": 2.0}}}))
    served, simulated = Deployment.load(tmp_path / "x.yaml"), Experiment.load(tmp_path / "x.yaml")
    for one in (served, simulated):
        again = read_back(json.loads(json.dumps(one.resolved())), "log")
        assert type(again) is type(one)
        assert again.resolved() == one.resolved()
    assert "network" not in served.resolved()["cluster"]
    assert "hardware" not in served.resolved()["cluster"]["instances"][0]
    assert served.with_(seed=3).seed == 3


def test_formats_are_those_of_the_deployment_where_the_study_names_none() -> None:
    def formats(**keys: Any) -> tuple[str | None, str]:
        made = Experiment.parse({**PLAIN, **keys}).formats
        return made.weight_dtype, made.kv

    assert formats() == (None, "bf16")
    assert formats(dtype="float32") == ("fp32", "fp32")
    assert formats(dtype="bfloat16", quantization="wint4") == ("wint4", "bf16")
    assert formats(quantization="wint8", cost={"weight_dtype": "fp8", "kv_dtype": "fp8"}) == ("fp8", "fp8")


def test_instances_may_keep_kv_in_formats_of_their_own() -> None:
    rows = [{"role": "prefill", "hardware": "l4"}, {"role": "decode", "hardware": "l4", "engine": {"kv_cache_dtype": "fp8"}}]
    experiment = Experiment.parse({**PLAIN, "cluster": {"instances": rows}, "engine": {"kv_cache_dtype": "bfloat16"}})
    assert [experiment.formats_of(one.engine).kv for one in experiment.placements()] == ["bf16", "fp8"]
    with pytest.raises(UsageError, match=r"cost\.kv_dtype: engine\.kv_cache_dtype says what KV is kept in: remove one of the two"):
        experiment.with_({"cost.kv_dtype": "fp8"})


def test_an_instance_is_the_one_of_its_name_or_any_of_its_role() -> None:
    rows = [{"role": "decode", "engine": {"max_seqs": 8}}, {"role": "prefill", "count": 2, "engine": {"max_seqs": 4}, "device": "cuda:1"}]
    deployment = Deployment.parse({"model": "m", "device": "cuda", "cluster": {"instances": rows}})
    for name in ("prefill-1", "mine", ""):
        placed = deployment.place_of(name, "prefill")
        assert placed is not None
        assert (placed.engine.max_seqs, placed.device) == (4, "cuda:1")
    assert deployment.place_of("", "mixed") is None
    two = deployment.with_(**{"cluster.instances": [*rows, {"role": "decode", "device": "cpu"}]})
    assert two.place_of("decode-1", "decode") == two.placements()[3]
    with pytest.raises(
        UsageError, match="instances of role decode differ: say with --instance-name which it is, such as decode-0, decode-1"
    ):
        two.place_of("mine", "decode")
