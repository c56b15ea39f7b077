"""Grok-2, Step-3, MiMo-V2 and Ring-linear: their figures are their cards', and what would decide one is not guessed."""

from __future__ import annotations

import copy

import pytest

from pdlab.core.types import UsageError
from pdlab.cost.huggingface import parse
from pdlab.cost.shapes import Part
from tests.cost.own_code_configs import OWN_CODE


@pytest.mark.parametrize("name", OWN_CODE)
def test_figures_are_those_of_the_card(name):
    config, billions, kv_kib, active_b = OWN_CODE[name]
    m = parse(config, name).model
    assert m.total_params == pytest.approx(billions * 1e9, rel=0.012)
    assert m.kv_bytes_per_token() == kv_kib * 1024
    assert m.active_params == pytest.approx(active_b * 1e9, rel=0.05)


def test_layers_of_a_window_have_heads_of_their_own():
    m = parse(OWN_CODE["mimo-v2-flash"][0], "m").model
    assert [(a.layers, a.kv_heads, a.window_tokens) for a in m.attention] == [(9, 4, 0), (39, 8, 128)]
    config = copy.deepcopy(OWN_CODE["mimo-v2-flash"][0])
    pattern, sparse = config.pop("hybrid_layer_pattern"), config.pop("moe_layer_freq")
    config["layer_types"] = ["sliding_attention" if one else "full_attention" for one in pattern]
    config["mlp_layer_types"] = ["sparse" if one else "dense" for one in sparse]
    assert parse(config, "m").model == m, "as transformers spells it"


def test_what_a_quantisation_leaves_alone_is_counted_as_it_is_stored():
    m = parse(OWN_CODE["mimo-v2-flash"][0], "m").model
    stored = {w.format.dtype: w.params for w in m.weights if w.part is Part.ATTENTION}
    assert stored["bf16"] == 48 * 64 * 128 * 4096


def test_most_layers_of_ring_linear_keep_a_state_and_no_kv():
    m = parse(OWN_CODE["ring-flash-linear"][0], "m").model
    assert (m.main.layers, m.recurrence[0].layers) == (4, 28)
    tail = OWN_CODE["ring-mini-linear"][0] | {"num_hidden_layers": 22}
    assert parse(tail, "m").model.main.layers == 6, "whole groups, and what is left beyond them"


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("grok-2", "residual_moe"), ("grok-2", "moe_intermediate_size"),
        ("step-3", "share_q_dim"), ("step-3", "moe_layers_enum"), ("step-3", "num_attention_groups"), ("step-3", "share_expert_dim"),
        ("mimo-v2-flash", "hybrid_layer_pattern"), ("mimo-v2-flash", "swa_num_key_value_heads"), ("mimo-v2-flash", "moe_layer_freq"),
        ("ring-mini-linear", "layer_group_size"), ("ring-mini-linear", "num_shared_experts"),
    ],
)  # fmt: skip
def test_a_missing_key_is_an_error_that_names_it(name, key):
    config = copy.deepcopy(OWN_CODE[name][0])
    del (config.get("text_config") or config)[key]
    with pytest.raises(UsageError, match=f"lacks '{key}'"):
        parse(config, name)


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("grok-2", {"sliding_window_size": 4096, "global_attn_every_n": 4}, "which layers have it is not known"),
        ("step-3", {"moe_layers_enum": "4,x"}, "moe_layers_enum must list layers below 61"),
        ("step-3", {"moe_layers_enum": [61]}, "moe_layers_enum must list layers below 61"),
        ("mimo-v2-flash", {"hybrid_layer_pattern": [0, 1]}, "hybrid_layer_pattern lists 2 layers, and there are 48"),
        ("mimo-v2-flash", {"layer_types": ["odd"] * 48}, "layer_types has 'odd'"),
        ("ring-mini-linear", {"head_dim": 64}, "16 heads of 64 are not the hidden size 2048"),
    ],
)
def test_what_cannot_be_is_named(name, change, says):
    config = copy.deepcopy(OWN_CODE[name][0])
    (config.get("text_config") or config).update(change)
    with pytest.raises(UsageError) as caught:
        parse(config, name)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_the_image_captioner_whose_model_type_grok_2_has_is_not_taken_for_it():
    with pytest.raises(UsageError, match="unknown model_type 'git'"):
        parse(OWN_CODE["grok-2"][0] | {"architectures": ["GitForCausalLM"]}, "m")
