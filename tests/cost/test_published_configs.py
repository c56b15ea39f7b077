"""Configs as they were published, with all the keys that decide nothing."""

import pytest

from pdlab.cost.huggingface import parse
from tests.cost.published_configs import PUBLISHED


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_kv_are_those_of_the_model_card(name):
    config, billions, kv_kib = PUBLISHED[name]
    m = parse(config, name).model
    assert m.total_params == pytest.approx(billions * 1e9, rel=0.01)
    assert m.kv_bytes_per_token() == kv_kib * 1024


@pytest.mark.parametrize(
    ("name", "active_b"),
    [("minimax-text-01", 45.9 + 2.5), ("dbrx", 36), ("llama-4-scout", 17), ("jamba-mini", 12), ("kimi-linear", 3.0 + 0.4), ("arctic", 17)],
)
def test_active_parameters_are_those_of_the_model_card(name, active_b):
    """The cards of MiniMax and Kimi Linear leave embedding and head out."""
    assert parse(PUBLISHED[name][0], name).model.active_params == pytest.approx(active_b * 1e9, rel=0.03)


def test_windows_experts_and_states_are_found_by_layer():
    scout, gemma, jamba = (parse(PUBLISHED[name][0], name).model for name in ("llama-4-scout", "gemma-3n-e4b", "jamba-mini"))
    assert (scout.window_layers, scout.window_tokens, scout.moe_layers) == (36, 8192, 48)
    assert (gemma.window_layers, sum(a.kv_layers for a in gemma.attention), gemma.layers) == (28, 20, 35)
    assert (sum(a.layers for a in jamba.attention), sum(r.layers for r in jamba.recurrence), jamba.moe_layers) == (4, 28, 16)
