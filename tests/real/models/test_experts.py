"""Routed experts of an engine: few tokens and many give the same, quantised or not."""

from __future__ import annotations

import pytest
import torch

from pdlab.real.models.experts import ExpertLoader, RoutedPass
from pdlab.real.models.linear import maker
from pdlab.real.models.moe import MoeConfig, shapes

HIDDEN = 64


def made(family: str = "qwen3_moe", quantization: str = "", **more: bool) -> RoutedPass:
    moe = MoeConfig(layers=(True,), experts=6, per_token=2, width=32, **more)  # type: ignore[arg-type]
    loader = ExpertLoader(moe, family, torch.device("cpu"), torch.float32, maker(quantization), torch.clone)
    random = torch.Generator().manual_seed(0)
    for name, shape in reversed(list(shapes(moe, family, HIDDEN, 0))):
        assert loader.take(name, torch.randn(shape, generator=random) * 0.2)
    assert not loader.take("model.layers.0.self_attn.q_proj.weight", torch.zeros(1))
    return loader.layer(0)


@pytest.mark.parametrize("quantization", ["", "wint8", "wint4"])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_many_tokens_meet_the_experts_that_few_do(family: str, quantization: str) -> None:
    routed = made(family, quantization)
    x = torch.randn(200, HIDDEN, generator=torch.Generator().manual_seed(1))
    many = routed(x)
    few = torch.cat([routed(part) for part in x.split(7)])
    torch.testing.assert_close(many, few, atol=1e-4, rtol=1e-4)


def test_shares_add_up_to_one_where_they_are_renormalised() -> None:
    x = torch.randn(5, HIDDEN)
    assert torch.allclose(made().router(x)[1].sum(-1), torch.ones(5))
    assert (made(renormalise=False).router(x)[1].sum(-1) < 1).all()
