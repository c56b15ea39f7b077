"""A model folder that is not right: which file, and what is wrong with it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from pdlab.core.types import UsageError
from pdlab.kernels.linear import Int8Weight, dequantize_int4, dequantize_int8
from pdlab.real.engine.load import load
from pdlab.real.engine.messages import Sampling
from pdlab.real.engine.options import EngineOptions
from pdlab.real.engine.runner import Piece
from pdlab.real.models.attention import SoftmaxPass
from pdlab.real.models.feed_forward import GatedPass
from pdlab.real.models.linear import Dense, Linear
from tests.support.engine_driver import Driver

Tiny = Callable[[str], tuple[Path, PreTrainedModel]]
Spoil = Callable[[Path], None]


def config(**changes: Any) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / "config.json"
        kept = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: value for key, value in kept.items() if value is not ...}))

    return spoil


def write(name: str, content: bytes) -> Spoil:
    return lambda folder: (folder / name).write_bytes(content) and None


def tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / "model.safetensors"
        found = load_file(path)
        change(found)
        save_file(found, path)

    return spoil


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json: No such file or directory"),
        (write("config.json", b"{"), "config.json is not JSON"),
        (write("config.json", b"[]"), "config.json is not a JSON object"),
        (config(model_type="gpt2"), "model_type 'gpt2' is not one of llama, mistral, qwen2, qwen3"),
        (config(num_hidden_layers=...), "config.json lacks 'num_hidden_layers'"),
        (config(hidden_size="wide"), "hidden_size must be a whole number, not 'wide'"),
        (config(num_key_value_heads=3), "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        (config(hidden_act="gelu"), "hidden_act 'gelu' is not supported"),
        (config(quantization_config={"quant_method": "gptq"}), "quantised with gptq are not supported"),
        (config(rope_parameters={"rope_type": "longrope", "rope_theta": 1e4}), "rope scaling 'longrope' is not one of linear"),
        (config(vocab_size=301), "has shape (300, 64), config.json asks for (301, 64)"),
        (write("model.safetensors", b"not this"), "model.safetensors is not a readable safetensors file"),
        (cut, "model.safetensors is not a readable safetensors file"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no *.safetensors"),
        (tensors(lambda found: found.pop(NORM) is None), f"its safetensors lack {NORM}"),
        (write("model.safetensors.index.json", b'{"weight_map": {"a": "gone.safetensors"}}'), "names gone.safetensors, which is not there"),
        (write("model.safetensors.index.json", b"{}"), "has no readable weight_map"),
    ],
)
def test_a_spoilt_folder_says_which_file_and_what(spoil: Spoil, says: str, tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny("llama")[0], folder)
    spoil(folder)
    with pytest.raises(UsageError, match=re.escape(says)) as raised:
        load(EngineOptions(model=str(folder), kv_blocks=50))
    assert "\n" not in str(raised.value)


def test_weights_in_several_files_load(tiny: Tiny, tmp_path: Path) -> None:
    source, model = tiny("llama")
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    whole, parts = (load(EngineOptions(model=str(path), kv_blocks=50)).engine.runner.model for path in (source, tmp_path))
    assert torch.equal(whole.embedding.weight, parts.embedding.weight)
    assert torch.equal(whole.layers[2].feed_forward.down.weight, parts.layers[2].feed_forward.down.weight)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("quantization", "most"), [("wint8", 0.06), ("wint4", 0.6)])
def test_quantised_weights_are_smaller_and_near(quantization: str, most: float, tiny: Tiny) -> None:
    folder = str(tiny("llama")[0])
    plain, packed = (load(EngineOptions(model=folder, kv_blocks=50, quantization=q)).engine.runner for q in ("", quantization))
    pieces = [Piece(list(range(1, 60)), 0, list(range(9)), True)]
    original = plain.run(pieces)
    assert (packed.run(pieces) - original).norm() / original.norm() < most
    sizes = [sum(layer.out.weight_bytes for layer in runner.model.layers) for runner in (plain, packed)]
    assert sizes[1] < sizes[0] / 3


def _widened(narrow: Linear) -> Dense:
    weight = narrow.weight
    return Dense(dequantize_int8(weight) if isinstance(weight, Int8Weight) else dequantize_int4(weight), None)


@pytest.mark.parametrize("rows", [59, 20, 3])
@pytest.mark.parametrize("quantization", ["wint8", "wint4"])
def test_quantised_products_are_those_of_the_widened_weights(quantization: str, rows: int, tiny: Tiny) -> None:
    folder = str(tiny("llama")[0])
    plain, packed = (load(EngineOptions(model=folder, kv_blocks=50, quantization=q)).engine.runner for q in ("", quantization))
    for wide, narrow in zip(plain.model.layers, packed.model.layers, strict=True):
        attention, feed = narrow.attention, narrow.feed_forward
        assert isinstance(attention, SoftmaxPass) and isinstance(wide.attention, SoftmaxPass) and isinstance(feed, GatedPass)
        wide.attention = replace(wide.attention, qkv=_widened(attention.qkv))
        wide.out = _widened(narrow.out)
        wide.feed_forward = GatedPass(_widened(feed.gate_up), _widened(feed.down))
    pieces = [Piece(list(range(rows)), 0, list(range(9)), True)]
    torch.testing.assert_close(packed.run(pieces), plain.run(pieces), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen3", "gpt-oss", "deepseek-v3", "ernie4_5-moe", "gemma3"])
def test_random_weights_need_a_config_only(family: str, tiny: Tiny, tmp_path: Path) -> None:
    shutil.copy(tiny(family)[0] / "config.json", tmp_path)
    d = Driver(load(EngineOptions(model=str(tmp_path), load_format="dummy", kv_blocks=50)).engine)
    d.submit(0, [1, 2, 3], Sampling(max_tokens=4))
    d.run()
    assert len(d.tokens[0, 0]) == 4


def test_a_catalogue_name_is_enough_for_random_weights() -> None:
    loaded = load(EngineOptions(model="smollm2-135m", load_format="dummy", kv_blocks=20, max_model_len=256))
    assert loaded.config.layers == 30
    assert loaded.engine.worker.most_tokens == 256
    with pytest.raises(UsageError, match="only models of the families"):
        load(EngineOptions(model="opt-13b", load_format="dummy"))


@pytest.mark.parametrize("quantization", ["", "wint4"])
def test_weights_that_exceed_the_memory_are_refused_before_any_is_made(quantization: str) -> None:
    with pytest.raises(UsageError, match=r"weights of [\d,]+ GiB exceed the [\d.]+ GiB that are available here"):
        load(EngineOptions(model="deepseek-v3", load_format="dummy", quantization=quantization, kv_blocks=20, max_model_len=256))


@pytest.mark.parametrize("quantization", ["", "wint8"])
@pytest.mark.parametrize("tokens", [1, 2, 8, 40])  # each kind of product: our kernels', packed, widened
def test_bfloat16_runs(tiny: Tiny, tokens: int, quantization: str) -> None:
    folder = str(tiny("llama")[0])
    exact, rough = (
        load(EngineOptions(model=folder, kv_blocks=50, dtype=dtype, quantization=quantization)).engine.runner
        for dtype in ("float32", "bfloat16")
    )
    pieces = [Piece(list(range(tokens)), 0, list(range(5)), True)]
    expected = exact.run(pieces)
    assert (rough.run(pieces) - expected).norm() / expected.norm() < 0.1
