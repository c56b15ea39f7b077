"""`pdlab tokenizer export`: a folder that transformers loads, and that gives every text the same ids."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pdlab.cli.main import app
from pdlab.cli.tokenizer import export
from pdlab.core.types import UsageError
from pdlab.real.models.gguf_file import default_model
from pdlab.real.models.tokenizer import Tokenizer
from tests.support import echo_engine

TEXTS = [
    "",
    " ",
    "\n\n \t x",
    "Hello, world!",
    "The capital of France is Paris. It's 1,234,567.89 or 12e-7...",
    "def f(x):\n    return {'a': [x ** 2 for _ in range(10)]}\n",
    "Grüße aus Köln \u2013 naïve façade; русский текст; 日本語のテキスト、中文\uff1b한국어; עברית; العربية",
    "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 \u200b\u00a0\ufeff x\u0000y",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|> <|im_start|>assistant",
    "a" * 1000 + " " * 50 + "!" * 77,
    "https://example.org/a?b=c&d=%20#e \\frac{1}{2} \r\n\r x",
]


@pytest.fixture(scope="module")
def model() -> Path:
    try:
        return default_model()
    except UsageError as missing:
        pytest.skip(str(missing))


def test_transformers_gives_the_same_ids_texts_and_chats(model: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ended = CliRunner().invoke(app, ["tokenizer", "export", str(tmp_path / "out")])
    assert ended.exit_code == 0 and str(tmp_path / "out") in ended.output
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "out"), Tokenizer.load(model)
    draw = random.Random(3)
    made = [
        "".join(
            chr(draw.choice((draw.randrange(32, 127), draw.randrange(0xA1, 0x3000), draw.randrange(0x1F300, 0x1F700)))) for _ in range(60)
        )
        for _ in range(100)
    ]
    for text in [*TEXTS, *made]:
        for special in (True, False):
            ids = ours.encode(text, special)
            assert theirs.encode(text, add_special_tokens=special) == ids, text
        assert theirs.decode(ids) == ours.decode(ids, skip_special=False)
    assert len(theirs) == ours.vocab and theirs.eos_token_id in ours.eos_ids
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "x"}]
    assert theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == ours.templates.chat(chat)


def test_our_own_reader_takes_the_folder_as_it_takes_the_model(model: Path, tmp_path: Path) -> None:
    ours = Tokenizer.load(model)
    export(ours, tmp_path / "deep" / "out")
    again = Tokenizer.load(tmp_path / "deep" / "out")
    assert (again.eos_ids, again.vocab, again.spelling, again.special_ids) == (ours.eos_ids, ours.vocab, ours.spelling, ours.special_ids)
    assert [again.encode(text) for text in TEXTS] == [ours.encode(text) for text in TEXTS]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]  # nothing was left aside


def test_another_models_folder_can_be_exported_and_what_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    folder = echo_engine.byte_tokenizer(tmp_path / "model")
    where = tmp_path / "out"
    where.mkdir()
    (where / "notes.txt").write_text("mine")
    ended = CliRunner().invoke(app, ["tokenizer", "export", str(where), "--model", str(folder)])
    assert ended.exit_code == 0, ended.output
    assert (where / "notes.txt").read_text() == "mine" and json.loads((where / "tokenizer.json").read_text())
    assert Tokenizer.load(where).encode("hello") == Tokenizer.load(folder).encode("hello")


@pytest.mark.parametrize(
    ("arguments", "words"), [(["{file}"], "is a file"), (["{out}", "--model", "nowhere"], "nowhere: no such folder or file")]
)
def test_mistakes_are_a_line_and_leave_nothing(arguments: list[str], words: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    told = [one.format(file=tmp_path / "file", out=tmp_path / "out") for one in arguments]
    ended = CliRunner().invoke(app, ["tokenizer", "export", *told])
    assert isinstance(ended.exception, UsageError) and words in str(ended.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
