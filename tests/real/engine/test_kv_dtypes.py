"""KV in fewer bits than what is computed: the engine is a reference whose KV is rounded likewise, however the work is cut up."""

from __future__ import annotations

import inspect
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from pdlab.core.types import UsageError
from pdlab.real.engine.load import load, load_model
from pdlab.real.engine.memory import cpu_kv_blocks, kv_item_bytes
from pdlab.real.engine.messages import Sampling
from pdlab.real.engine.options import EngineOptions
from pdlab.real.engine.runner import Piece
from pdlab.real.models import attention
from pdlab.real.models import config as configs
from tests.support.engine_driver import Driver

Tiny = Callable[[str], tuple[Path, PreTrainedModel]]
GREEDY = Sampling(max_tokens=8, temperature=0.0)
KV = {"fp8": torch.float8_e4m3fn, "bfloat16": torch.bfloat16}
WITHIN = {"fp8": 2e-3, "bfloat16": 5e-4}  # one number that falls on the other side of a border is more than float32 is off


class RoundingCache(DynamicCache):
    """transformers' own, of keys and values that were rounded."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.rounds_to = dtype

    def update(self, key_states: Tensor, value_states: Tensor, *rest: Any, **named: Any) -> tuple[Tensor, Tensor]:
        k, v = (x.clamp(-448.0, 448.0).to(self.rounds_to).to(x.dtype) for x in (key_states, value_states))
        return super().update(k, v, *rest, **named)  # type: ignore[no-any-return]


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(300) for _ in range(rng.choice((1, 4, 17, 40)))] for _ in range(count)]


def last_logits(model: PreTrainedModel, tokens: list[int], cache: DynamicCache) -> Tensor:
    name = "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"  # as transformers before 5.24
    logits: Tensor = model(torch.tensor([tokens]), **{name: cache}).logits[0, -1]
    return logits


@torch.no_grad()
def greedy(model: PreTrainedModel, prompt: list[int], tokens: int, kv: str) -> list[int]:
    cache, found, given = RoundingCache(KV[kv]), list[int](), prompt
    for _ in range(tokens):
        given = [int(last_logits(model, given, cache).argmax())]
        found += given
    return found


@pytest.mark.parametrize(("family", "kv"), [("llama", "fp8"), ("qwen3", "fp8"), ("qwen3-moe", "fp8"), ("llama", "bfloat16")])
def test_logits_are_those_of_a_cache_that_rounds(family: str, kv: str, driver: Callable[..., Driver], tiny: Tiny) -> None:
    """Of a whole prompt, of its last token alone, and far enough from those of KV that is not rounded."""
    prompt = [random.Random(5).randrange(300) for _ in range(90)]
    with torch.no_grad():
        expected, exact = (last_logits(tiny(family)[1], prompt, cache) for cache in (RoundingCache(KV[kv]), DynamicCache()))
    runner, table = driver(family, kv_cache_dtype=kv).engine.runner, list(range(40))
    whole = runner.run([Piece(prompt, 0, table, True)])[0]
    alone = runner.run([Piece(prompt[-1:], 89, table, True)])[0]
    assert runner.kv.dtype == KV[kv]
    for found in (whole, alone):
        assert (found - expected).norm() < WITHIN[kv] * expected.norm() < (exact - expected).norm()


def test_a_latent_vector_is_rounded_as_it_is_stored(driver: Callable[..., Driver], monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = [random.Random(5).randrange(300) for _ in range(90)]

    def logits(**own: object) -> Tensor:
        return driver("deepseek-v3", **own).engine.runner.run([Piece(prompt, 0, list(range(30)), True)])[0]

    found, exact, store_kv = logits(kv_cache_dtype="fp8"), logits(), attention.store_kv

    def rounding(k: Tensor, v: Tensor, *rest: Tensor) -> None:
        store_kv(*(x.to(torch.float8_e4m3fn).to(x.dtype) for x in (k, v)), *rest)

    monkeypatch.setattr(attention, "store_kv", rounding)
    expected = logits()
    assert (found - expected).norm() < WITHIN["fp8"] * expected.norm() < (exact - expected).norm()


@pytest.mark.parametrize("own", [{}, {"tp": 2}, {"kv_blocks": 24}, {"kv_cache_dtype": "bfloat16"}], ids=str)
def test_tokens_in_chunks_from_the_prefix_cache_and_after_preemption(
    own: dict[str, Any], driver: Callable[..., Driver], tiny: Tiny
) -> None:
    d = driver("llama", **{"max_batch_tokens": 24, "kv_cache_dtype": "fp8", **own})
    expected = [greedy(tiny("llama")[1], prompt, GREEDY.max_tokens, own.get("kv_cache_dtype", "fp8")) for prompt in prompts(6)]
    for repeat in range(2):
        for i, prompt in enumerate(prompts(6)):
            d.submit(10 * repeat + i, prompt, GREEDY)
        d.run()
    assert [d.tokens[10 * repeat + i, 0] for repeat in (0, 1) for i in range(6)] == 2 * expected
    assert (d.engine.scheduler.preemptions if "kv_blocks" in own else d.engine.prefix_hits) > 0


def test_as_much_memory_has_so_many_more_blocks(tiny: Tiny) -> None:
    path = str(tiny("llama")[0])

    def blocks(**own: Any) -> int:
        options = EngineOptions(model=path, kv_gib=0.002, **own)
        found = load_model(options, torch.device("cpu")).kv_blocks
        assert found == cpu_kv_blocks(options, configs.of(path), kv_item_bytes(options)), "known before torch is"
        return found

    half = blocks(dtype="bfloat16")
    assert blocks(dtype="bfloat16", kv_cache_dtype="fp8") in (2 * half, 2 * half + 1)
    assert blocks(kv_cache_dtype="bfloat16") == half and blocks(kv_cache_dtype="fp8_e4m3") in (2 * half, 2 * half + 1)


@pytest.mark.parametrize(
    ("own", "says"),
    [
        ({"kv_cache_dtype": "fp8_e5m2"}, "--kv-cache-dtype fp8_e5m2 is not one of auto, fp8, fp8_e4m3, float32, bfloat16, float16"),
        (
            {"kv_cache_dtype": "float32", "dtype": "bfloat16"},
            "float32 is no narrower than bfloat16, which is computed in: give --dtype float32",
        ),
        ({"kv_cache_dtype": "float16"}, "--kv-cache-dtype float16 is for accelerators; on a CPU use fp8, bfloat16 or float32"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(own: dict[str, Any], says: str, tiny: Tiny) -> None:
    with pytest.raises(UsageError, match=says):
        load(EngineOptions(model=str(tiny("llama")[0]), kv_blocks=20, **own))


def test_scales_of_a_file_are_said_to_be_ignored(tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tiny("llama")[0]
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    scales = {f"model.layers.{layer}.self_attn.{name}_scale": torch.tensor(0.5) for layer in range(3) for name in "kv"}
    save_file(load_file(folder / "model.safetensors") | scales, tmp_path / "model.safetensors")
    for kv in ("auto", "fp8"):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            load(EngineOptions(model=str(tmp_path), kv_blocks=20, kv_cache_dtype=kv))
        said = [record.getMessage() for record in caplog.records if "scale" in record.getMessage()]
        expected = f"model.layers.0.self_attn.k_scale and 5 more scales of KV in {tmp_path} are ignored: KV has a scale of 1"
        assert said == ([expected] if kv == "fp8" else [])
