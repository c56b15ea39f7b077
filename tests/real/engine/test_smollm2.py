"""The embedded model: 50 prompts of varied length give what transformers gives, and it knows France."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pdlab.real.engine.engine import Engine
from pdlab.real.engine.load import load
from pdlab.real.engine.messages import Sampling
from pdlab.real.engine.options import EngineOptions
from pdlab.real.models import gguf_file
from pdlab.real.models.tokenizer import Tokenizer
from tests.support.engine_driver import Driver

SUBJECTS = ("rivers", "prime numbers", "the French revolution", "bees", "tides", "glass", "chess", "the moon", "bread", "sleep")
ASKS = ("Explain {} to a child.", "Write one sentence about {}.", "What is known of {}?", "List three facts on {}:", "{}")


@pytest.fixture(scope="module")
def path() -> Path:
    return gguf_file.default_model()


@pytest.fixture(scope="module")
def engine(path: Path) -> Engine:
    eos = tuple(Tokenizer.load(path).eos_ids)
    return load(EngineOptions(model=str(path), max_batch_tokens=256, kv_gib=0.5, eos_ids=eos)).engine


def prompts(tokenizer: Tokenizer) -> list[list[int]]:
    """50, of 1 to some 400 tokens."""
    rng = random.Random(0)
    filler = " ".join(rng.choice(SUBJECTS) for _ in range(300))
    texts = [ask.format(subject) for subject in SUBJECTS for ask in ASKS]
    return [tokenizer.encode(filler)[: rng.choice((0, 0, 0, 20, 100, 380))] + tokenizer.encode(text) for text in texts]


@pytest.mark.parametrize("of", [4, pytest.param(1, marks=pytest.mark.slow)], ids=["every fourth", "all"])
def test_fifty_prompts_give_what_transformers_gives(of: int, path: Path, engine: Engine) -> None:
    config = gguf_file.config(path)
    reference = LlamaForCausalLM(
        LlamaConfig(**{k: v for k, v in config.items() if k not in ("dtype", "architectures", "model_type")})
    ).eval()
    weights = {name: torch.from_numpy(array) for name, array in gguf_file.tensors(path)}
    missing, unexpected = reference.load_state_dict(weights, strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not unexpected
    reference.tie_weights()
    d = Driver(engine)
    every = prompts(Tokenizer.load(path))
    asked = every[::of]
    for i, prompt in enumerate(asked):
        d.submit(i, prompt, Sampling(max_tokens=12, temperature=0.0, ignore_eos=True))
    d.run()
    assert len(every) == 50
    with torch.no_grad():  # the likeliest token at every place, given those before it: greedy decoding, checked in one pass a prompt
        for i, prompt in enumerate(asked):
            made = d.tokens[i, 0]
            logits = reference(torch.tensor([prompt + made[:-1]]), use_cache=False, logits_to_keep=len(made)).logits[0]
            assert logits.argmax(-1).tolist() == made, f"prompt {i}"


def test_it_knows_the_capital_of_france(path: Path, engine: Engine) -> None:
    tokenizer = Tokenizer.load(path)
    d = Driver(engine)
    chat = tokenizer.templates.chat([{"role": "user", "content": "What is the capital of France?"}])
    d.submit(1000, tokenizer.encode(chat, special=False), Sampling(max_tokens=30, temperature=0.0))
    d.run()
    assert d.finish[1000, 0] == "stop"
    assert "Paris" in tokenizer.decode(d.tokens[1000, 0])
