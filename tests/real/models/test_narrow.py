"""Weights in 8 and 4 bits are those that transformers' model has when it gets what they stand for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pdlab.core.types import UsageError
from pdlab.kernels.linear import Fp8Weight, Mxfp4Weight, NarrowWeight, dequantize_mxfp4
from pdlab.real.engine.load import load
from pdlab.real.engine.options import EngineOptions
from pdlab.real.engine.runner import Piece, Runner
from pdlab.real.models import config as configs
from pdlab.real.models.experts import RoutedPass
from pdlab.real.models.linear import Narrow
from pdlab.real.models.model import ALONE, DecoderModel
from pdlab.real.models.narrow import part_of, stacked, widened
from pdlab.real.models.ranks import WeightPart
from pdlab.real.models.weights import from_folder
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


def logits_of_narrow(folder: Path) -> Tensor:
    """Of experts that stay as they are stored."""
    config = configs.of(str(folder))
    found = from_folder(folder, config, ALONE, narrow_experts=True)
    model = DecoderModel(config, found, device=torch.device("cpu"), dtype=torch.float32, max_positions=64)
    routed = next(each for layer in model.layers if isinstance(each := layer.feed_forward, RoutedPass))
    assert all(isinstance(linear, Narrow) for linear in routed.down)
    return Runner(model, kv_blocks=40, block_tokens=4).run([Piece(PROMPT, 0, list(range(10)), True)])[0]


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
    for found in (logits, logits_of_narrow)[: 1 if family == "qwen3" else 2]:
        assert (found(tmp_path) - expected).norm() / expected.norm() < 1e-4


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
            packed = stored[f"{name}_blocks"].flatten(-2)
            assert torch.equal(dequantize_mxfp4(Mxfp4Weight(packed, scales)), wide)
    expected = model(torch.tensor([PROMPT]), use_cache=False).logits[0, -1]
    rewritten(tmp_path, stored, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]})
    for found in (logits, logits_of_narrow):
        assert (found(tmp_path) - expected).norm() / expected.norm() < 1e-4


RANDOM = torch.Generator().manual_seed(5)
FP8 = Fp8Weight(torch.randn(70, 50, generator=RANDOM).to(torch.float8_e4m3fn), torch.rand(3, 3, generator=RANDOM), (BLOCK, BLOCK))
MXFP4 = Mxfp4Weight(
    torch.randint(256, (4, 6, 64), dtype=torch.uint8, generator=RANDOM),
    torch.randint(120, 130, (4, 6, 4), dtype=torch.uint8, generator=RANDOM),
)


@pytest.mark.parametrize(
    ("weight", "part"),
    [
        (FP8, WeightPart(0, 24, 46)),
        (FP8, WeightPart(1, 24, 10)),
        (FP8, WeightPart(0, 0, 0)),
        (MXFP4, WeightPart(0, 1, 2)),
        (MXFP4, WeightPart(1, 64, 32)),
        (MXFP4, WeightPart(2, 3, 3)),
    ],
)
def test_a_ranks_part_of_a_narrow_weight_is_that_of_the_wide_one(weight: NarrowWeight, part: WeightPart) -> None:
    own = part_of(weight, part)
    assert own is not None
    assert torch.equal(widened(own), widened(weight)[part.index])


@pytest.mark.parametrize(("weight", "part"), [(FP8, WeightPart(0, 25, 5)), (MXFP4, WeightPart(1, 16, 32)), (MXFP4, WeightPart(1, 32, 16))])
def test_a_part_that_begins_within_a_block_of_scales_is_widened(weight: NarrowWeight, part: WeightPart) -> None:
    assert part_of(weight, part) is None


def test_gates_and_ups_are_stacked_where_their_scales_allow_it() -> None:
    whole, cut = part_of(FP8, WeightPart(0, 0, 48)), FP8
    assert whole is not None and (both := stacked(whole, whole)) is not None
    assert torch.equal(widened(both), widened(whole).repeat(2, 1))
    assert stacked(cut, cut) is None


def test_a_weight_without_its_scales_is_named(tmp_path: Path) -> None:
    tiny_models.make("qwen3", tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    stored["model.layers.0.mlp.up_proj.weight"] = stored["model.layers.0.mlp.up_proj.weight"].to(torch.float8_e4m3fn)
    rewritten(tmp_path, stored, {"quant_method": "fp8", "weight_block_size": [128, 128]})
    with pytest.raises(
        UsageError, match=r"have model\.layers\.0\.mlp\.up_proj\.weight and lack model\.layers\.0\.mlp\.up_proj\.weight_scale_inv"
    ):
        logits(tmp_path)
