import pytest

from pdlab.core.types import UsageError
from pdlab.cost.capacity import kv_capacity_tokens
from pdlab.cost.catalogue import hardware, model

# DistServe's own count of KV tokens that fit beside OPT on A100-80GB, at tensor parallelism 1, 2, 4, ...
DISTSERVE = [("opt-13b", 1, 66144), ("opt-13b", 2, 163008), ("opt-13b", 4, 356736), ("opt-66b", 4, 78496), ("opt-66b", 8, 212304)]


@pytest.mark.parametrize(("name", "tp", "tokens"), DISTSERVE)
def test_capacity_is_near_what_distserve_reports(name, tp, tokens):
    assert kv_capacity_tokens(model(name), hardware("a100"), tp, utilization=0.95) == pytest.approx(tokens, rel=0.06)


def test_eight_bit_kv_holds_twice_as_much():
    llama, h100 = model("llama-3.1-8b"), hardware("h100")
    assert kv_capacity_tokens(llama, h100, kv_dtype="fp8") == pytest.approx(2 * kv_capacity_tokens(llama, h100), abs=1)


def test_a_model_too_large_says_how_much_is_missing_and_the_smallest_tp():
    with pytest.raises(
        UsageError, match=r"llama-3.1-70b in bf16 does not fit 1 x h100-sxm: 6\d\.\d GB missing .*smallest tp that fits is 2"
    ):
        kv_capacity_tokens(model("llama-3.1-70b"), hardware("h100"))
    with pytest.raises(UsageError, match="no larger tp fits"):
        kv_capacity_tokens(model("kimi-k2"), hardware("l4"))


def test_the_named_smallest_tp_does_fit_and_the_one_below_does_not():
    with pytest.raises(UsageError, match="smallest tp that fits is 8"):
        kv_capacity_tokens(model("bloom-176b"), hardware("a100"), 4)
    assert kv_capacity_tokens(model("bloom-176b"), hardware("a100"), 8) > 0


@pytest.mark.parametrize("tp", [0, 3, -1])
def test_tp_must_divide_the_heads(tp):
    with pytest.raises(UsageError, match=f"tp {tp} (does not divide the 32 attention heads|must be at least 1)"):
        kv_capacity_tokens(model("llama-3.1-8b"), hardware("h100"), tp)


def test_utilization_is_a_fraction():
    with pytest.raises(UsageError, match="utilization 90"):
        kv_capacity_tokens(model("llama-3.1-8b"), hardware("h100"), utilization=90)
