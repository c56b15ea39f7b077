import csv
from importlib import resources
from pathlib import Path

import pytest

from pdlab.core.types import UsageError
from pdlab.cost import catalogue
from pdlab.cost.catalogue import hardware, hardware_names, model, model_names, understood
from pdlab.cost.shapes import GIB

PUBLISHED = {
    row["name"]: (float(row["total_params_b"] or 0), float(row["active_params_b"] or 0))
    for row in csv.DictReader(resources.files("pdlab.cost").joinpath("models.csv").read_text(encoding="utf-8").splitlines())
}


def test_it_holds_at_least_20_accelerators_and_30_models():
    assert len(hardware_names()) >= 20
    assert len(model_names()) >= 30
    assert {"ascend-910b3", "ascend-910c", "h100-sxm", "a100-sxm-80gb"} <= set(hardware_names())


@pytest.mark.parametrize("name", [name for name, (total, _) in PUBLISHED.items() if total])
def test_parameters_counted_from_the_shape_match_the_published_total(name):
    assert model(name).total_params == pytest.approx(PUBLISHED[name][0] * 1e9, rel=0.03)


@pytest.mark.parametrize("name", ["mixtral-8x7b", "deepseek-v3", "qwen3-235b-a22b", "kimi-k2", "ernie-4.5-300b-a47b"])
def test_active_parameters_of_experts_match_the_published_figure(name):
    assert model(name).active_params == pytest.approx(PUBLISHED[name][1] * 1e9, rel=0.03)


@pytest.mark.parametrize(
    ("alias", "name"), [("910B", "ascend-910b3"), ("H100", "h100-sxm"), ("a100_sxm", "a100-sxm-80gb"), ("gb200", "gb200-nvl72")]
)
def test_accelerators_answer_to_aliases_in_any_case(alias, name):
    assert hardware(alias).name == name


@pytest.mark.parametrize(
    ("alias", "name"), [("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b"), ("bloom", "bloom-176b"), ("LLAMA2-70B", "llama-2-70b")]
)
def test_models_answer_to_aliases_and_hub_names(alias, name):
    assert model(alias).name == name


CONFIGS = sorted(path.stem for path in (Path(catalogue.__file__).parent / "configs").iterdir())


def test_every_shipped_config_is_a_model_of_the_catalogue_and_has_all_that_it_needs():
    assert set(CONFIGS) <= set(model_names())
    for name in CONFIGS:
        known = understood(name)
        assert known.model.name == name
        assert known.quantization == "none" or known.model.weight_dtype != "bf16"
        assert not set(known.filled) - {"first_k_dense_replace", "tie_word_embeddings"}, name


@pytest.mark.parametrize("name", CONFIGS)
def test_active_parameters_of_shipped_configs_are_those_of_the_card(name):
    assert model(name).active_params == pytest.approx(PUBLISHED[name][1] * 1e9, rel=0.035)


def test_layers_that_the_columns_cannot_say_come_from_the_config():
    qwen, glm = model("Qwen/Qwen3.5-397B-A17B"), model("glm-5")
    assert (qwen.main.layers, qwen.recurrence[0].layers) == (15, 45)
    assert glm.main.index_dim == 128 and glm.main.window_tokens == 2048
    assert model("kimi-k2.5").weights_bytes() == pytest.approx(594e9, rel=0.01)


ISSUE = (
    "qwen3.5-397b-a17b qwen3-next llama-4-scout llama-4-maverick glm-4.5 glm-4.6 glm-5 kimi-k2.5 minimax-m2.5 deepseek-v3.2 "
    "gpt-oss-120b gpt-oss-20b ernie-4.5-300b"
)
RACKS = "h20 h100 h200 b200 b300 gb200 gb300 mi300x mi325x mi355x ascend-910b ascend-910c l40s rtx-pro-6000 l4 a100"


def test_what_people_serve_with_and_on_is_known_by_name():
    assert all(model(name).source for name in ISSUE.split())
    assert all(hardware(name).source for name in RACKS.split())
    assert hardware("gb200").scaleup_domain == hardware("gb300").scaleup_domain == 72


def test_recalled_figures_are_marked_unverified():
    assert not hardware("ascend-910c").verified
    assert not model("opt-13b").verified
    assert hardware("h100").verified
    assert model("llama-3.1-8b").verified
    for name in hardware_names():
        assert hardware(name).verified != ("recalled" in hardware(name).source), name


def test_every_accelerator_is_complete():
    for name in hardware_names():
        h = hardware(name)
        assert min(h.bf16_flops, h.hbm_bytes, h.hbm_bytes_per_s, h.pcie_bytes_per_s, h.nic_bytes_per_s) > 0, name
        assert 8 * GIB < h.hbm_bytes < 512 * GIB, name
        assert (h.scaleup_bytes_per_s > 0) == (h.scaleup_domain > 1), name


@pytest.mark.parametrize(
    ("find", "wrong", "near"),
    [(hardware, "h100-smx", "h100-sxm"), (model, "lama-3.1-8b", "llama-3.1-8b"), (model, "qwen3-33b", "qwen3-32b")],
)
def test_an_unknown_name_offers_the_three_nearest(find, wrong, near):
    with pytest.raises(UsageError, match=f"unknown .*'{wrong}': nearest are .*{near}") as caught:
        find(wrong)
    assert str(caught.value).split("nearest are ")[1].split(", or")[0].count(",") == 2


@pytest.mark.parametrize(
    ("find", "name", "said"),
    [
        (model, "folder", "model 'folder': the folder .*/folder has no config.json"),
        (model, "x.yaml", "model 'x.yaml': the file .*/x.yaml is not a Hugging Face config.json, whose name ends in .json"),
        (hardware, "folder", "hardware 'folder': the folder .*/folder has profiles at most: name the .json itself"),
        (hardware, "x.yaml", "hardware 'x.yaml': the file .*/x.yaml is not a profile of pdlab calibrate, whose name ends in .json"),
    ],
)
def test_a_path_that_is_there_is_not_taken_for_an_unknown_name(find, name, said, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "x.yaml").write_text("")
    with pytest.raises(UsageError, match=said):
        find(name, tmp_path)


@pytest.mark.parametrize("find", [model, hardware])
def test_a_name_too_long_for_a_path_is_an_unknown_name(find, tmp_path):
    with pytest.raises(UsageError, match=r"unknown .* nearest are"):
        find("a" * 300, tmp_path)


def test_links_for_tensor_parallelism():
    h100, l40s, a40 = hardware("h100-sxm"), hardware("l40s"), hardware("a40")
    assert h100.link_bytes_per_s(8) == 450e9
    assert h100.link_bytes_per_s(16) == h100.nic_bytes_per_s == 50e9
    assert l40s.link_bytes_per_s(2) == l40s.pcie_bytes_per_s == 32e9
    assert (a40.link_bytes_per_s(2), a40.link_bytes_per_s(4)) == (56.25e9, 32e9)


def test_the_peak_depends_on_the_number_format():
    h100, a100 = hardware("h100"), hardware("a100")
    assert h100.flops("fp8") == 1979e12
    assert h100.flops("wint4") == h100.flops("bf16") == 989e12
    assert a100.flops("fp8") == a100.flops("bf16")


def test_weights_and_kv_bytes():
    llama = model("llama-3.1-8b")
    assert llama.weights_bytes("bf16") == 2 * llama.total_params
    assert llama.weights_bytes("fp8") == llama.total_params + llama.embedding_params
    assert llama.weights_bytes("wint4") < 0.4 * llama.weights_bytes("bf16")
    assert llama.kv_bytes_per_token("bf16") == 131072
    assert llama.kv_bytes_per_token("fp8") == 65536


def test_kv_is_replicated_where_heads_are_fewer_than_ranks():
    llama, deepseek = model("llama-3.1-8b"), model("deepseek-v3")
    assert llama.kv_bytes_per_token("bf16", tp=8) == llama.kv_bytes_per_token("bf16", tp=1)
    assert llama.kv_bytes_per_token("bf16", tp=16) == 2 * llama.kv_bytes_per_token("bf16", tp=8)
    assert llama.kv_bytes_per_token_per_rank("bf16", tp=16) == llama.kv_bytes_per_token_per_rank("bf16", tp=8) == 16384
    assert deepseek.kv_bytes_per_token("bf16") == 70272
    assert deepseek.kv_bytes_per_token("bf16", tp=8) == 8 * 70272


def test_the_shipped_names_do_not_collide():
    assert len(catalogue._models()) > len(model_names())
