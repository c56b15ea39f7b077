"""Weights in 8 and 4 bits are those that transformers' model has when it gets what they stand for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pdlab.core.types import UsageError
from pdlab.real.engine.load import load
from pdlab.real.engine.options import EngineOptions
from pdlab.real.engine.runner import Piece
from pdlab.real.models.narrow import widen_mxfp4
from tests.support import tiny_models

BLOCK = 24  # which fills no matrix
PROMPT = [(7 * i) % 300 for i in range(40)]


def rewritten(folder: Path, tensors: dict[str, Tensor], quantization: dict[str, object]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))


def logits(folder: Path) -> Tensor:
    runner = load(EngineOptions(model=str(folder), block_tokens=4, kv_blocks=40)).engine.runner
    return runner.run([Piece(PROMPT, 0, list(range(10)), True)])[0]


def in_fp8(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(e4m3, a scale for each block, what they stand for)."""
    narrow, wide = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.empty(weight.shape)
    scales = torch.empty(-(-weight.shape[0] // BLOCK), -(-weight.shape[1] // BLOCK))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = slice(BLOCK * i, BLOCK * (i + 1)), slice(BLOCK * j, BLOCK * (j + 1))
            scales[i, j] = weight[at].abs().max() / 448
            narrow[at] = (weight[at] / scales[i, j]).to(torch.float8_e4m3fn)
            wide[at] = narrow[at].float() * scales[i, j]
    return narrow, scales, wide


@pytest.mark.parametrize("family", ["deepseek-v3", "qwen3"])
@torch.no_grad()
def test_fp8_in_blocks(family: str, tmp_path: Path) -> None:
    model = tiny_models.make(family, tmp_path)
    stored: dict[str, Tensor] = {}
    exact: dict[str, Tensor] = {}
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        if name.endswith(("_proj.weight", "with_mqa.weight")):
            stored[name], stored[f"{name}_scale_inv"], exact[name] = in_fp8(tensor)
        else:
            stored[name] = exact[name] = tensor
    save_file(exact, tmp_path / "model.safetensors", metadata={"format": "pt"})
    expected = type(model).from_pretrained(tmp_path)(torch.tensor([PROMPT]), use_cache=False).logits[0, -1]
    rewritten(tmp_path, stored, {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"})
    found = logits(tmp_path)
    assert (found - expected).norm() / expected.norm() < 1e-4


@torch.no_grad()
def test_mxfp4_experts(tmp_path: Path) -> None:
    model = tiny_models.make("gpt-oss", tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    random = torch.Generator().manual_seed(2)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    for name, parameter in model.named_parameters():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, inputs, out = parameter.shape
            codes = torch.randint(0, 16, (experts, out, inputs), generator=random, dtype=torch.uint8)
            scales = torch.randint(122, 126, (experts, out, inputs // 32), generator=random, dtype=torch.uint8)
            wide = values[(codes & 7).int()] * (1 - 2 * (codes >> 3).float()) * (2.0 ** (scales.float() - 127)).repeat_interleave(32, 2)
            parameter.copy_(wide.transpose(1, 2))
            del stored[name]
            stored[f"{name}_blocks"] = (codes[..., 0::2] | codes[..., 1::2] << 4).unflatten(2, (-1, 16))
            stored[f"{name}_scales"] = scales
            assert torch.equal(widen_mxfp4(stored[f"{name}_blocks"], scales), wide)
    expected = model(torch.tensor([PROMPT]), use_cache=False).logits[0, -1]
    rewritten(tmp_path, stored, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]})
    found = logits(tmp_path)
    assert (found - expected).norm() / expected.norm() < 1e-4


def test_a_weight_without_its_scales_is_named(tmp_path: Path) -> None:
    tiny_models.make("qwen3", tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    stored["model.layers.0.mlp.up_proj.weight"] = stored["model.layers.0.mlp.up_proj.weight"].to(torch.float8_e4m3fn)
    rewritten(tmp_path, stored, {"quant_method": "fp8", "weight_block_size": [128, 128]})
    with pytest.raises(
        UsageError, match=r"have model\.layers\.0\.mlp\.up_proj\.weight and lack model\.layers\.0\.mlp\.up_proj\.weight_scale_inv"
    ):
        logits(tmp_path)
