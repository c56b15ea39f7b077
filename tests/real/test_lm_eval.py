"""lm-eval runs its log-likelihood tasks against `pdlab serve`, and finds what transformers computes. Opt-in: needs `lm_eval` with its `api`
extra and transformers, in whatever environment its command is; nothing is fetched."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pdlab.real.models.tokenizer import Tokenizer
from tests.support import served

LM_EVAL = shutil.which(os.environ.get("LM_EVAL", "lm_eval"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        LM_EVAL is None, reason="lm_eval is not installed: pip install 'lm_eval[api]' transformers, or LM_EVAL=PATH names it"
    ),
]

QUESTIONS = [
    {"question": "The sky is", "choices": ["blue", "a kind of cheese", "🧀"], "answer": 0},
    {"question": "Déjà", "choices": ["vu", "là"], "answer": 1},
    {"question": "1 + 1 =", "choices": ["2", "3", "11"], "answer": 0},
]
TEXTS = [{"text": "Il était une fois une reine."}, {"text": "x"}]
CHOICES = """\
task: pdlab_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/questions.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""
ROLLING = """\
task: pdlab_texts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/texts.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list: [{{metric: byte_perplexity}}]
"""


def tasks(folder: Path) -> None:
    (folder / "questions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in QUESTIONS))
    (folder / "texts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in TEXTS))
    (folder / "choices.yaml").write_text(CHOICES.format(folder=folder))
    (folder / "texts.yaml").write_text(ROLLING.format(folder=folder))


def samples(folder: Path, task: str) -> list[dict[str, Any]]:
    (path,) = folder.rglob(f"samples_{task}_*.jsonl")
    return sorted((json.loads(line) for line in path.read_text().splitlines()), key=lambda sample: int(sample["doc_id"]))


def test_log_likelihoods_are_those_of_transformers(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    model = served.make(tmp_path / "model")
    tasks(tmp_path)
    with served.server(model, "--served-model-name", "tiny") as (url, _):
        options = (
            f"model=tiny,base_url={url}/v1/completions,tokenizer={model},tokenizer_backend=huggingface,num_concurrent=2,max_length=256"
        )
        command = [str(LM_EVAL), "run", "--model", "local-completions", "--model_args", options, "--include_path", str(tmp_path)]
        command += ["--tasks", "pdlab_choices,pdlab_texts", "--log_samples", "--output_path", str(tmp_path / "found")]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert ran.returncode == 0, ran.stderr[-3000:]
    likelihood = Reference(model)
    for sample, question in zip(samples(tmp_path / "found", "pdlab_choices"), QUESTIONS, strict=True):
        for (told, greedy), choice in zip(sample["filtered_resps"], question["choices"], strict=True):  # type: ignore[arg-type,call-overload]
            expected = likelihood(f"{question['question']}", f" {choice}")
            assert float(told) == pytest.approx(expected, abs=0.02)
            assert str(greedy) == "False"  # of a random model
    for sample, text in zip(samples(tmp_path / "found", "pdlab_texts"), TEXTS, strict=True):
        told = sample["filtered_resps"][0]
        assert float(told[0] if isinstance(told, list) else told) == pytest.approx(likelihood("<eos>", text["text"]), abs=0.02)


class Reference:
    """Sums of log-probabilities, by transformers."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = Tokenizer.load(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder)

    def __call__(self, context: str, text: str) -> float:
        before, tokens = self.tokenizer.encode(context), self.tokenizer.encode(text)
        with torch.no_grad():
            logprobs = self.model(torch.tensor([before + tokens])).logits[0].log_softmax(-1)
        return sum(float(logprobs[len(before) + at - 1, token]) for at, token in enumerate(tokens))
