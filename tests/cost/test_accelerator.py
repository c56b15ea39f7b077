"""Accelerators that the user writes: figures over those of another, or all of a new one; in an experiment or in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pdlab.cli.main import main
from pdlab.core.types import UsageError
from pdlab.cost.accelerator import AcceleratorSpec
from pdlab.cost.catalogue import hardware
from pdlab.experiment.experiment import Experiment
from pdlab.experiment.hardware_file import read_accelerators
from pdlab.sim import simulate

NEW = {
    "name": "lab", "family": "h100", "bf16_tflops": 400, "hbm_gib": 64, "hbm_gbytes_per_s": 2000, "pcie_gbytes_per_s": 64,
    "nic_gbit_per_s": 200,
}  # fmt: skip
EXPERIMENT: dict[str, Any] = {
    "model": "llama-3.1-8b",
    "workload": {"source": "synthetic", "requests": 20, "rate": 5, "prompt": 200, "output": 20},
    "cluster": {"instances": [{"role": "mixed", "hardware": {"like": "h100-sxm", "hbm_gib": 96}}]},
}


def written(**figures: Any) -> AcceleratorSpec:
    return AcceleratorSpec.model_validate(figures)


def test_figures_that_are_not_given_are_those_of_the_one_it_is_like() -> None:
    own, base = hardware(written(like="H100", hbm_gib=96, nic_gbit_per_s=800)), hardware("h100-sxm")
    assert (own.hbm_bytes, own.nic_bytes_per_s) == (96 * 2**30, 100e9)
    assert (own.bf16_flops, own.family, own.scaleup_domain) == (base.bf16_flops, base.family, base.scaleup_domain)
    assert own.name == "custom-H100" and not own.verified and "h100-sxm" in own.source


def test_a_new_one_has_all_its_figures() -> None:
    own = hardware(written(**NEW))
    assert (own.bf16_flops, own.hbm_bytes, own.scaleup_domain, own.fp8_flops) == (400e12, 64 * 2**30, 1, 0.0)


@pytest.mark.parametrize(
    ("figures", "says"),
    [
        ({"like": "h100-smx"}, "unknown hardware 'h100-smx': nearest are h100-sxm"),
        ({"hbm_gib": 96}, "lacks name, family, bf16_tflops, hbm_gbytes_per_s, pcie_gbytes_per_s, nic_gbit_per_s"),
        ({"like": "l4", "scaleup_domain": 8}, "a scale-up domain of 8 and 0 GB/s do not fit together"),
        ({"like": "h100", "scaleup_domain": 1}, "a scale-up domain of 1 and 450 GB/s do not fit together"),
        ({"like": "h100", "family": "hopper"}, "family: 'hopper' is not one of ampere, ada"),
        ({"like": "p.json"}, "unknown hardware 'p.json'"),
    ],
)
def test_what_does_not_fit_is_told_in_a_line(figures: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        hardware(written(**figures))
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("figures", "says"),
    [
        ({"like": "h100", "hbm_gb": 96}, "cluster.instances.0.hardware.hbm_gb: unknown key; nearest is hbm_gib"),
        ({"like": "h100", "hbm_gib": -1}, "cluster.instances.0.hardware.hbm_gib: must be above 0, not -1"),
        ({"like": "h100", "hbm_gib": "big"}, "cluster.instances.0.hardware.hbm_gib: must be a number, not 'big'"),
        ({"like": "h100", "tdp_w": True}, "cluster.instances.0.hardware.tdp_w: must be a number, not true"),
        ({"like": "h100-smx"}, "cluster.instances.0.hardware: unknown hardware 'h100-smx'"),
        (["h100"], "cluster.instances.0.hardware: must be text or a mapping, not ['h100']"),
    ],
)
def test_an_experiment_says_where_the_mistake_is(figures: object, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        Experiment.parse({**EXPERIMENT, "cluster": {"instances": [{"role": "mixed", "hardware": figures}]}})
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_it_is_simulated_as_its_figures_say_and_kept_with_the_results(tmp_path: Path) -> None:
    own = Experiment.parse(EXPERIMENT)
    result = simulate(own)
    (use,) = result.summary["instances"]
    assert use["hardware"] == "custom-h100-sxm"
    again = Experiment.parse(own.resolved())
    assert again.cluster == own.cluster
    plain = simulate(own.with_({"cluster.instances.0.hardware": "h100-sxm"}))
    assert use["kv_blocks"] > plain.summary["instances"][0]["kv_blocks"], "for it has more memory"


def test_a_file_has_several_by_name_or_one_by_its_own(tmp_path: Path) -> None:
    (tmp_path / "ours.yaml").write_text("a: {like: h20, hbm_gib: 141}\nb: {like: l4}\n")
    (tmp_path / "c.yaml").write_text("like: a100\nhbm_gib: 96\n")
    assert read_accelerators(tmp_path / "ours.yaml") == {
        "a": {"like": "h20", "name": "a", "hbm_gib": 141.0},
        "b": {"like": "l4", "name": "b"},
    }
    assert list(read_accelerators(tmp_path / "c.yaml")) == ["c"]


def test_rows_name_those_of_the_file_and_files_beside_the_experiment(tmp_path: Path) -> None:
    rows = "[{role: prefill, hardware: a}, {role: decode, hardware: c.yaml}]"
    workload = "{source: synthetic, requests: 5, rate: 2, prompt: 20, output: 2}"
    text = f"model: llama-3.1-8b\nworkload: {workload}\ncluster: {{instances: {rows}}}\n"
    (tmp_path / "e.yaml").write_text(text)
    (tmp_path / "ours.yaml").write_text("a: {like: h20, hbm_gib: 141}\n")
    (tmp_path / "c.yaml").write_text("{like: a100, hbm_gib: 96}\n")
    loaded = Experiment.load(tmp_path / "e.yaml", (), tmp_path / "ours.yaml")
    assert [str(row.hardware) for row in loaded.cluster.instances] == ["a", "c"]
    (varied,) = loaded.with_({"cluster.instances.1.hardware": "a", "cluster.instances.1.count": 1}).cluster.instances[1:]
    assert str(varied.hardware) == "a", "as the values of a sweep name it"
    with pytest.raises(UsageError, match="unknown hardware 'b'"):
        loaded.with_({"cluster.instances.1.hardware": "b"})
    with pytest.raises(UsageError, match="unknown hardware 'a'"):
        Experiment.load(tmp_path / "e.yaml")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: {like: h20, hbm_gb: 141}\n", "f.yaml: a: hbm_gb: unknown key; nearest is hbm_gib"),
        ("a: {like: h2O}\n", "f.yaml: a: unknown hardware 'h2O'"),
        ("like: h20\nhbm_gib: no\n", "f.yaml: hbm_gib: must be a number, not false"),
        ("model: llama-3.1-8b\ncluster: {}\n", "f.yaml is an experiment, not a file of accelerators"),
        ("", "f.yaml: a file of accelerators is a mapping of keys to values, not an empty file"),
    ],
)
def test_a_wrong_file_is_told_in_a_line(text: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "f.yaml").write_text(text)
    with pytest.raises(SystemExit) as exit:
        main(["hardware", "--hardware-file", str(tmp_path / "f.yaml")])
    said = capsys.readouterr().err.strip()
    assert exit.value.code == 2 and says in said and len(said.splitlines()) == 1, said


def test_the_command_lists_them_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "f.yaml").write_text("ours: {like: h20, hbm_gib: 141}\n")
    with pytest.raises(SystemExit) as exit:
        main(["hardware", "--hardware-file", str(tmp_path / "f.yaml")])
    assert exit.value.code == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:3] == ["ours", "nvidia", "141"]
