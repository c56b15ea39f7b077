from math import inf

import pytest
from pydantic import ValidationError

from pdlab.core.types import UsageError
from pdlab.cost.fitted import DecodeFit, Fitted, FittedCoefficients, PrefillFit, shipped_fit

FIT = FittedCoefficients(
    prefill=PrefillFit(base_s=0.01, s_per_token=1e-4, s_per_token2=1e-8),
    decode=DecodeFit(base_s=0.02, s_per_token=1e-6, s_per_sequence=1e-5),
    large=DecodeFit(base_s=0.01, s_per_token=2e-6, s_per_sequence=1e-4),
    large_batch=95,
)


def test_prefill_is_the_sum_of_lengths_and_of_their_squares():
    assert Fitted(FIT).prefill_s([(100, 0), (200, 0)]) == pytest.approx(0.01 + 1e-4 * 300 + 1e-8 * (100**2 + 200**2))


def test_chunks_of_a_prompt_add_up_to_the_whole_and_one_base_each():
    cost = Fitted(FIT)
    assert cost.prefill_s([(300, 0)]) + cost.prefill_s([(200, 300)]) == pytest.approx(cost.prefill_s([(500, 0)]) + 0.01)


def test_decode_changes_regime_at_the_large_batch():
    cost = Fitted(FIT)
    assert cost.decode_line(94, 5000) == (pytest.approx(0.02 + 94e-5), 1e-6, inf)
    assert cost.decode_line(95, 5000) == (pytest.approx(0.01 + 95e-4), 2e-6, inf)
    assert cost.decode_s(94, 5000) == pytest.approx(0.02 + 94e-5 + 5e-3)


def test_a_mixed_step_pays_the_weights_once():
    cost = Fitted(FIT)
    assert cost.mixed_s([(1000, 0)], 10, 5000) == pytest.approx(cost.prefill_s([(1000, 0)]) + 1e-6 * 5000 + 1e-5 * 10)
    assert cost.mixed_s([(1, 0)], 10, 5000) == cost.decode_s(10, 5000)


def test_shipped_profiles_are_distserves_in_seconds():
    cost = Fitted(shipped_fit("distserve-opt-13b-a100", 1))
    assert cost.prefill_s([(512, 0)]) == pytest.approx((18.1025 + 0.101912 * 512 + 7.12226e-6 * 512**2) / 1e3, rel=1e-4)
    assert cost.decode_s(32, 32 * 512) == pytest.approx((19.9347 + 0.000626936 * 32 * 512 + 0.038507 * 32) / 1e3, rel=1e-4)
    assert cost.decode_s(100, 51200) == pytest.approx((7.16619 + 0.0005798 * 51200 + 0.158311 * 100) / 1e3, rel=1e-4)


def test_unknown_profiles_and_tps_are_named():
    with pytest.raises(UsageError, match="nearest are distserve-opt-13b-a100"):
        shipped_fit("distserve-opt-13-a100", 1)
    with pytest.raises(UsageError, match="has no tp 8: choose one of 1, 2, 4"):
        shipped_fit("distserve-opt-13b-a100", 8)


def test_an_unknown_coefficient_is_refused():
    with pytest.raises(ValidationError, match="extra"):
        PrefillFit(base_s=0.0, s_per_token=0.0, slope=1.0)


def test_no_step_is_negative():
    falling = FIT.model_copy(update={"prefill": PrefillFit(base_s=0.01, s_per_token=0.0, s_per_token2=-1e-6)})
    assert Fitted(falling).prefill_s([(4096, 0)]) == 0.0
