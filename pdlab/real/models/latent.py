"""MLA's weights, collected by name. The two halves of what leads out of the latent space are kept apart: one meets queries, one outputs."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from pdlab.real.models.attention import LatentPass, Rotary, in_halves
from pdlab.real.models.config import ModelConfig
from pdlab.real.models.linear import Linear, Make

PATTERN = re.compile(
    r"model\.layers\.(\d+)\.self_attn\.(q_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|q_a_layernorm|kv_a_layernorm)\.weight"
)
MADE = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa")


class LatentLoader:
    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype, make: Make, rotary: Rotary) -> None:
        assert config.latent is not None
        self.config, self.latent, self.device, self.dtype, self.make, self.rotary = config, config.latent, device, dtype, make, rotary
        self.linears: dict[tuple[int, str], Linear] = {}
        self.plain: dict[tuple[int, str], Tensor] = {}

    def take(self, name: str, tensor: Tensor) -> bool:
        """False: it is nothing of its."""
        found = PATTERN.fullmatch(name)
        if found is None:
            return False
        layer, part, c = int(found[1]), found[2], self.latent
        tensor = tensor.to(self.device, self.dtype)
        if self.config.interleaved and part in ("q_proj", "q_b_proj"):
            tensor = in_halves(tensor, c.nope_dim + c.rope_dim, c.rope_dim)
        if self.config.interleaved and part == "kv_a_proj_with_mqa":
            tensor = in_halves(tensor, c.rank + c.rope_dim, c.rope_dim)
        if part in MADE:
            self.linears[layer, part] = self.make(tensor.contiguous(), None)
        else:
            self.plain[layer, part] = tensor
        return True

    def layer(self, index: int) -> LatentPass:
        c = self.latent
        heads = self.plain.pop((index, "kv_b_proj")).view(-1, c.nope_dim + c.v_dim, c.rank)
        return LatentPass(
            latent=c,
            heads=self.config.heads,
            scale=self.config.scale,
            eps=1e-6,  # of the norms within, whatever the others' is
            rotary=self.rotary,
            q_down=self.linears.get((index, "q_a_proj")),
            q_norm=self.plain.get((index, "q_a_layernorm")),
            q_up=self.linears[index, "q_b_proj" if c.q_rank else "q_proj"],
            kv_down=self.linears[index, "kv_a_proj_with_mqa"],
            kv_norm=self.plain[index, "kv_a_layernorm"],
            to_latent=heads[:, : c.nope_dim].contiguous(),
            from_latent=heads[:, c.nope_dim :].transpose(1, 2).contiguous(),
        )
