import pytest
from pydantic import ValidationError

from pdlab.core.predict import DecodePredictor, PrefillPredictor
from pdlab.core.types import UsageError
from pdlab.cost import CostSpec, Fitted, Roofline, Table, build, hardware, model, profiles, save_profile
from pdlab.cost.roofline import coefficients
from pdlab.cost.table import DecodeGrid, PrefillGrid, Profile

LLAMA, H100 = model("llama-3.1-8b"), hardware("h100")
PROFILE = Profile(
    prefill=PrefillGrid(tokens=(1, 8000), seconds=((0.005,), (0.2,))),
    decode=DecodeGrid(batch=(1, 256), context=(1, 4000), seconds=((0.005, 0.006), (0.01, 0.1))),
)


def test_the_default_is_the_familys_roofline():
    cost = build(CostSpec(), LLAMA, H100)
    assert isinstance(cost, Roofline)
    assert cost.decode_s(8, 8000) == Roofline(LLAMA, H100, achieved=coefficients("h100-vllm")).decode_s(8, 8000)
    other = build(CostSpec(), LLAMA, H100, like="sglang")
    assert other.decode_s(8, 8000) == Roofline(LLAMA, H100, achieved=coefficients("h100-sglang")).decode_s(8, 8000)


def test_a_coefficient_set_can_be_named_or_given():
    named = build(CostSpec(roofline="h100-2023"), LLAMA, H100)
    assert named.decode_s(8, 8000) > build(CostSpec(), LLAMA, H100).decode_s(8, 8000)
    fractions = dict.fromkeys(("compute", "compute_8bit", "memory", "attention_memory", "attention_compute", "collective"), 1.0)
    given = build(CostSpec.model_validate({"roofline": {**fractions, "collective_latency": 0.0}}), LLAMA, H100)
    assert given.decode_s(8, 8000) < build(CostSpec(), LLAMA, H100).decode_s(8, 8000)


def test_number_formats_reach_the_roofline():
    assert build(CostSpec(weight_dtype="fp8"), LLAMA, H100).decode_s(1, 100) < 0.7 * build(CostSpec(), LLAMA, H100).decode_s(1, 100)
    assert CostSpec().weights(model("deepseek-v3")) == "fp8"
    assert CostSpec(weight_dtype="bf16").weights(model("deepseek-v3")) == "bf16"


def test_a_table_is_found_beside_the_experiment(tmp_path):
    save_profile(PROFILE, tmp_path / "p.json")
    cost = build(CostSpec(table="p.json", extrapolate=True), LLAMA, H100, base_dir=tmp_path)
    assert isinstance(cost, Table)
    assert cost.extrapolate


def test_a_fit_can_be_named_or_given():
    cost = build(CostSpec(fitted="distserve-opt-13b-a100"), model("opt-13b"), hardware("a100"), parallel=2)
    assert isinstance(cost, Fitted)
    given = {"prefill": {"base_s": 0.01, "s_per_token": 1e-4}, "decode": {"base_s": 0.02, "s_per_token": 1e-6}}
    assert build(CostSpec.model_validate({"fitted": given}), LLAMA, H100).prefill_s([(100, 0)]) == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"roofline": "h100", "table": "x.json"}, "one of roofline, table, fitted, not roofline and table"),
        ({"rooflin": "h100"}, "Extra inputs"),
        ({"weight_dtype": "fp9"}, "unknown number format 'fp9': did you mean 'fp8'"),
        ({"extrapolate": True}, "extrapolate is for a table"),
    ],
)
def test_a_wrong_spec_is_refused(raw, said):
    with pytest.raises(ValidationError, match=said):
        CostSpec.model_validate(raw)


def test_a_wrong_name_is_the_users_mistake():
    with pytest.raises(UsageError, match="unknown roofline coefficients"):
        build(CostSpec(roofline="h1000"), LLAMA, H100)
    with pytest.raises(UsageError, match="No such file"):
        build(CostSpec(table="nope.json"), LLAMA, H100)


def test_profiles_let_predictors_reproduce_the_cost():
    cost = build(CostSpec(), LLAMA, H100)
    prefill, decode = profiles(cost, kv_tokens=400_000)
    ttft, tpot = PrefillPredictor(prefill), DecodePredictor(decode)
    for tokens in (300, 1000, 5000):
        assert ttft.seconds(tokens) == pytest.approx(cost.prefill_s([(tokens, 0)]), rel=0.15)
    for batch, context in ((4, 4000), (32, 40_000), (128, 200_000)):
        assert tpot.seconds(batch, context) == pytest.approx(cost.decode_s(batch, context), rel=0.1)
    assert all(context <= 400_000 for _, context, _ in decode)


def test_profiles_of_a_table_keep_to_its_grid():
    prefill, decode = profiles(Table(PROFILE))
    assert max(tokens for tokens, _ in prefill) <= 8000
    assert {context // batch for batch, context, _ in decode} == {128, 512, 1024, 2048}
    continued = Table(PROFILE, extrapolate=True)
    assert len(profiles(continued)[0]) > len(prefill)
    assert continued.extrapolated == 0


def test_a_factor_of_the_front_end_is_of_what_comes_before_a_first_token_alone():
    plain = build(CostSpec(), LLAMA, H100)
    tripled = build(CostSpec(factors={"front": 3.0}), LLAMA, H100)
    assert tripled.request_s == pytest.approx(3.0 * plain.request_s) and plain.request_s > 0.0
    assert tripled.decode_s(8, 8000) == plain.decode_s(8, 8000)
