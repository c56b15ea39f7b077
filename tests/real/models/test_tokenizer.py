from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import pre_tokenizers, processors
from transformers import AutoTokenizer
from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer

from pdlab.core.types import UsageError
from pdlab.real.models import gguf_file
from pdlab.real.models.detokenize import Detokenizer, StopStrings
from pdlab.real.models.spelling import BYTES
from pdlab.real.models.tokenizer import Tokenizer

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  two  spaces   and\ttabs\n\nand\r\nlines \n ",
    "12345 67,890.12   3 ½ ² ٣٤",
    "don't I'LL we've",
    "naïve façade Straße Ünḯcóde e\u0301",
    "日本語のテキスト 中文 한국어 ไทย العربية עברית",
    "🎉👩‍👩‍👧‍👦🇩🇪 ok 🙂",
    "def f(x: int) -> str:\n    return f'{x:>10}'  # comment\n\tif x != 3: pass",
    "<|im_start|>user\nhi<|im_end|><|endoftext|> <|im_end|>x",
    "\u200b\ufeff\x00\x07 zero",
    "a" * 300,
]
MESSAGES = [
    [{"role": "user", "content": "What is 2+2?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi 🙂"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": " c\n", "name": None}],
]
ids_in = st.lists(st.integers(0, 49151), max_size=40)
splits = st.lists(st.integers(1, 5), min_size=1, max_size=8)


@pytest.fixture(scope="session")
def ours() -> Tokenizer:
    return Tokenizer.load(gguf_file.default_model())


@pytest.fixture(scope="session")
def theirs() -> Any:
    path = gguf_file.default_model()
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.fixture(scope="session")
def digits(theirs: Any) -> Any:
    """transformers takes every GGUF pre-tokenizer it has no entry for to be GPT-2's; SmolLM2's own tokenizer.json splits digits first."""
    parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    return theirs


@pytest.fixture(scope="session")
def folder(digits: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("smollm2")
    digits.save_pretrained(path)
    (path / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    return path


@pytest.fixture(scope="session")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write_sentencepiece(tmp_path_factory.mktemp("sp") / "sp.gguf"))


def write(path: Path, model: str, tokens: list[str], types: list[int], **fields: Any) -> Path:
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for name, value in fields.items():
        key = name if name.startswith("tokenizer") else f"tokenizer.ggml.{name}"
        {str: writer.add_string, int: writer.add_uint32, bool: writer.add_bool, list: writer.add_array}[type(value)](key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def write_sentencepiece(path: Path, **fields: Any) -> Path:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = ["▁t", "he", "▁the", "in", "▁a", "er", "▁he", "ll", "▁hell", "▁hello", "lo", "or", "ld", "▁w", "▁wor", "▁world", "▁▁"]
    pieces = [*words, *"▁abcdefghijklmnopqrstuvwxyz!é日"]
    scores = [0.0] * len(tokens) + [-float(rank) for rank in range(len(pieces))]
    types = [2, 3, 3] + [6] * 256 + [1] * len(pieces) + [4, 3]
    roles = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    return write(path, "llama", [*tokens, *pieces, "<tool>", "<|im_end|>"], types, scores=[*scores, 0.0, 0.0], **roles, **fields)


def write_bytelevel(path: Path, pre: str, more: list[str], merges: list[str], **fields: Any) -> Path:
    tokens = [*BYTES, *more, "<|begin▁of▁text|>", "<|eot_id|>"]
    types = [1] * (len(tokens) - 2) + [3, 3]
    ends = {"bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1}
    return write(path, "gpt2", tokens, types, pre=pre, merges=merges, **ends, **fields)


@pytest.mark.parametrize("text", TEXTS)
def test_encodes_and_decodes_as_transformers(ours: Tokenizer, digits: Any, text: str) -> None:
    ids = ours.encode(text)
    assert ids == digits.encode(text)
    assert ours.decode(ids) == digits.decode(ids, skip_special_tokens=True)
    assert ours.decode(ids, skip_special=False) == digits.decode(ids) == text


@settings(max_examples=150, deadline=None)
@given(st.text(), ids_in)
def test_encodes_any_text_and_decodes_any_ids_as_transformers(ours: Tokenizer, digits: Any, text: str, ids: list[int]) -> None:
    assert ours.encode(text) == digits.encode(text)
    assert ours.decode(ids) == digits.decode(ids, skip_special_tokens=True)


def test_the_vocabulary_is_transformers(ours: Tokenizer, theirs: Any) -> None:
    assert ours.vocab == len(theirs) == 49152
    assert ours.backend.get_vocab() == theirs.get_vocab()
    assert ours.special_ids == {id for id, token in theirs.added_tokens_decoder.items() if token.special}
    assert ours.eos_ids == {0, 2}


@pytest.mark.parametrize("messages", MESSAGES)
def test_chats_as_transformers(ours: Tokenizer, folder: Path, digits: Any, messages: list[dict[str, Any]]) -> None:
    wanted = digits.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ours.templates.chat(messages) == wanted == Tokenizer.load(folder).templates.chat(messages)
    assert ours.encode(wanted, special=False) == digits.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ours.templates.chat(messages, add_generation_prompt=False) == digits.apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize("final", ["The answer", "The answer is ", [{"type": "text", "text": "x"}, {"type": "text", "text": "The "}]])
@pytest.mark.parametrize("trim", ["", " | trim"])
def test_continues_the_final_message_as_transformers(folder: Path, digits: Any, final: Any, trim: str, tmp_path: Path) -> None:
    said = "message.content" if isinstance(final, str) else "message.content[-1].text"
    template = f"{{% for message in messages %}}[{{{{ {said}{trim} }}}}]{{% endfor %}}{{% if add_generation_prompt %}}>{{% endif %}}"
    tokenizer = Tokenizer.load(copied(folder, tmp_path, template))
    messages = [{"role": "assistant", "content": final}]
    wanted = digits.apply_chat_template(messages, chat_template=template, tokenize=False, continue_final_message=True)
    assert tokenizer.templates.chat(messages, continue_final=True) == wanted


def test_templates_have_what_transformers_offers(folder: Path, digits: Any, tmp_path: Path) -> None:
    template = """
    {%- for message in messages %}
        {%- if message.role == 'skip' %}{% continue %}{% endif %}
        {%- generation %}{{ message.content | tojson }}{{ bos_token }}{% endgeneration %}
    {%- endfor %}
    {% if tools %}{{ tools | tojson(indent=2) }}{% endif %}
    {{ messages[-1].reasoning_content }} {{ strftime_now('%Y') | length }} {{ enable_thinking }}
    """
    tokenizer = Tokenizer.load(copied(folder, tmp_path, template))
    messages = [
        {"role": "user", "content": "<é>"},
        {"role": "skip", "content": "no"},
        {"role": "assistant", "content": "b", "thinking": "hm"},
    ]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    wanted = digits.apply_chat_template(
        messages, tools=tools, chat_template=template, tokenize=False, add_generation_prompt=True, enable_thinking=True
    )
    assert tokenizer.templates.chat(messages, tools=tools, enable_thinking=True) == wanted


def copied(folder: Path, to: Path, template: Any, **options: Any) -> Path:
    """The folder with another chat template: a string goes into its file, else into tokenizer_config.json; and with other options."""
    (to / "tokenizer.json").symlink_to(folder / "tokenizer.json")
    config = json.loads((folder / "tokenizer_config.json").read_text()) | options
    config.pop("chat_template", None)
    if isinstance(template, str):
        (to / "chat_template.jinja").write_text(template)
    elif template is not None:
        config["chat_template"] = template
    (to / "tokenizer_config.json").write_text(json.dumps(config))
    return to


def test_a_saved_folder_is_the_same_tokenizer(ours: Tokenizer, folder: Path) -> None:
    found = Tokenizer.load(folder)
    assert [found.encode(text) for text in TEXTS] == [ours.encode(text) for text in TEXTS]
    assert (found.vocab, found.eos_ids, found.special_ids, found.spelling) == (ours.vocab, ours.eos_ids, ours.special_ids, ours.spelling)
    assert found.templates


def test_bos_and_eos_are_added_as_tokenizer_json_has_it(folder: Path, tmp_path: Path, ours: Tokenizer) -> None:
    copied(folder, tmp_path, None, add_eos_token=True)  # which transformers overlooks, too
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    (tmp_path / "tokenizer.json").unlink()
    backend.save(str(tmp_path / "tokenizer.json"))
    found = Tokenizer.load(tmp_path)
    assert found.encode("hi") == AutoTokenizer.from_pretrained(tmp_path).encode("hi") == [1, *ours.encode("hi")]
    assert found.encode("hi", special=False) == ours.encode("hi")
    with pytest.raises(UsageError, match="has no chat template: use /v1/completions"):
        found.templates.chat(MESSAGES[0])


def test_named_templates(folder: Path, tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    found = Tokenizer.load(copied(folder, tmp_path, named))
    assert (found.templates.chat(MESSAGES[0]), found.templates.chat(MESSAGES[0], tools=[])) == ("plain", "tools")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "Expected an expression"),
        ("{{ messages[0].x.y }}", "x"),
    ],
)
def test_what_a_template_refuses_is_said(folder: Path, tmp_path: Path, template: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Tokenizer.load(copied(folder, tmp_path, template)).templates.chat(MESSAGES[0])


def test_mistakes_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UsageError, match=r"tokenizer\.json is no tokenizer"):
        Tokenizer.load(tmp_path)
    with pytest.raises(UsageError, match=r"cannot be read"):
        Tokenizer.load(tmp_path / "nowhere.gguf")
    with pytest.raises(UsageError, match="pre-tokenizer 'poro-chat' is not one of"):
        Tokenizer.load(write_bytelevel(tmp_path / "a.gguf", "poro-chat", [], []))
    with pytest.raises(UsageError, match="tokenizer 'bert' is not one of gpt2, llama"):
        Tokenizer.load(write(tmp_path / "b.gguf", "bert", ["a"], [1]))
    with pytest.raises(UsageError, match="does not fit together"):
        Tokenizer.load(write_bytelevel(tmp_path / "c.gguf", "gpt-2", [], ["x yz"]))


def test_pieces_are_the_bytes_of_their_tokens(ours: Tokenizer, sentencepiece: Tokenizer) -> None:
    for tokenizer in (ours, sentencepiece):
        text = "hello wörld 🎉 <|im_end|>"
        ids = tokenizer.encode(text, special=False)
        assert b"".join(map(tokenizer.piece_bytes, ids)).decode().strip() == text
        assert tokenizer.piece_bytes(10**6) == b"" and tokenizer.piece(10**6) == ""
    assert ours.piece(ours.encode(" the")[0]) == " the" and ours.piece(ours.encode("🎉")[-1]) == "\ufffd"


def test_a_sentencepiece_vocabulary(sentencepiece: Tokenizer, tmp_path: Path) -> None:
    def pieces(text: str) -> list[str]:
        return [sentencepiece.backend.id_to_token(id) for id in sentencepiece.encode(text)]

    assert pieces("hello the world") == ["<s>", "▁hello", "▁the", "▁world"]
    assert pieces("ß<tool>") == ["<s>", "▁", "<0xC3>", "<0x9F>", "<tool>"]
    assert sentencepiece.decode(sentencepiece.encode("  hello the é日 ß")) == "  hello the é日 ß"
    assert sentencepiece.eos_ids == {2, sentencepiece.vocab - 1}
    unprefixed = Tokenizer.load(write_sentencepiece(tmp_path / "a.gguf", add_space_prefix=False, add_bos_token=False))
    assert unprefixed.encode("the") == sentencepiece.encode("the", special=False)[:0] + [
        unprefixed.backend.token_to_id(t) for t in ("t", "he")
    ]


@settings(max_examples=60, deadline=None)
@given(st.text("helowrdt in!éß日🎉", min_size=1).filter(lambda text: not text.startswith(" ")))
def test_a_sentencepiece_vocabulary_is_read_as_transformers_reads_it(sentencepiece: Tokenizer, llama: Any, text: str) -> None:
    assert sentencepiece.encode(text, special=False) == llama.encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Backend:
    path = write_sentencepiece(tmp_path_factory.mktemp("sp") / "sp.gguf")
    architecture, tokenizer, _ = get_gguf_tokenizer(str(path))
    scores = gguf_file.read(path).fields["tokenizer.ggml.scores"].tolist()
    types = gguf_file.read(path).fields["tokenizer.ggml.token_type"].tolist()
    return convert_gguf_tokenizer(architecture, {**tokenizer, "scores": scores, "token_type": types})[0]


def test_pretokenizers_split_as_their_models_do(tmp_path: Path) -> None:
    more, merges = ["12", "123", "1234", "\u0120a", "\u0120\u0120"], ["1 2", "12 3", "123 4", "\u0120 a", "\u0120 \u0120"]

    def split(pre: str, text: str) -> list[str]:
        tokenizer = Tokenizer.load(write_bytelevel(tmp_path / f"{pre}.gguf", pre, more, merges))
        return [tokenizer.piece(id) for id in tokenizer.encode(text)]

    assert split("gpt-2", "1234  a") == ["1234", " ", " a"]
    assert split("smollm", "1234  1") == ["1", "2", "3", "4", "  ", "1"]
    assert split("qwen2", "1234  a e\u0301") == ["1", "2", "3", "4", " ", " a", " ", "\ufffd", "\ufffd"]
    assert split("llama-bpe", "1234  a") == ["<|begin▁of▁text|>", "123", "4", " ", " a"]
    assert split("tekken", "123A") == ["<|begin▁of▁text|>", "1", "2", "3", "A"]


@settings(max_examples=150, deadline=None)
@given(st.text(), ids_in, splits, st.booleans())
def test_detokenized_parts_make_the_whole(ours: Tokenizer, text: str, ids: list[int], sizes: list[int], skip: bool) -> None:
    for all_ids in (ours.encode(text), ids):
        assert in_parts(Detokenizer(ours, skip), all_ids, sizes) == ours.decode(all_ids, skip)


@settings(max_examples=150, deadline=None)
@given(st.text("helo wrdt!éß日🎉 "), splits, st.booleans(), st.booleans())
def test_detokenized_parts_make_the_whole_of_sentencepiece(
    sentencepiece: Tokenizer, text: str, sizes: list[int], skip: bool, special: bool
) -> None:
    ids = sentencepiece.encode(text, special)
    assert in_parts(Detokenizer(sentencepiece, skip), ids, sizes) == sentencepiece.decode(ids, skip)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(st.sampled_from([3 + 0xC3, 3 + 0x9F, 3 + 0xF0, 3 + 0x41]), st.integers(0, 300)), max_size=12), splits)
def test_bytes_that_are_no_characters(sentencepiece: Tokenizer, ids: list[int], sizes: list[int]) -> None:
    parts, whole = in_parts(Detokenizer(sentencepiece), ids, sizes), sentencepiece.decode(ids)
    assert parts.count("\ufffd") <= whole.count("\ufffd")  # what was whole characters before a wrong byte has been shown
    if "\ufffd" not in whole or "\ufffd" not in parts:
        assert parts == whole


def in_parts(detokenizer: Detokenizer, ids: list[int], sizes: list[int]) -> str:
    shown, at, turn = [], 0, 0
    while at < len(ids):
        size = sizes[turn % len(sizes)]
        shown.append(detokenizer.push(ids[at : at + size]))
        at, turn = at + size, turn + 1
    return "".join(shown) + detokenizer.finish()


def test_only_unfinished_characters_are_held_back(ours: Tokenizer, sentencepiece: Tokenizer) -> None:
    for tokenizer in (ours, sentencepiece):
        detokenizer = Detokenizer(tokenizer)
        shown = [detokenizer.push([id]) for id in tokenizer.encode("🎉a", special=False)]
        assert shown[-2:] == ["🎉", "a"] and not any(shown[:-2])
        assert detokenizer.finish() == ""
        detokenizer = Detokenizer(tokenizer)
        assert detokenizer.push(tokenizer.encode("a🎉", special=False)[:-1]) == "a"
        assert set(detokenizer.finish()) == {"\ufffd"}


def test_a_text_that_continues_a_prompt_keeps_its_first_space(sentencepiece: Tokenizer) -> None:
    ids = sentencepiece.encode("hello", special=False)
    assert (Detokenizer(sentencepiece).push(ids), Detokenizer(sentencepiece, continues=True).push(ids)) == ("hello", " hello")


def naive(text: str, stops: tuple[str, ...], include: bool) -> tuple[str, str | None]:
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end if include else end - len(stop)], stop
    return text, None


@settings(max_examples=400, deadline=None)
@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=5), max_size=3), splits, st.booleans())
def test_stop_strings_end_the_text(text: str, stops: list[str], sizes: list[int], include: bool) -> None:
    wanted, stop = naive(text, tuple(stops), include)
    strings, shown, at, turn = StopStrings(tuple(stops), include), "", 0, 0
    while at < len(text):
        size = sizes[turn % len(sizes)]
        part, ended = strings.push(text[at : at + size])
        shown, at, turn = shown + part, at + size, turn + 1
        assert wanted.startswith(shown)
        assert ended == (strings.matched is not None)
        if not ended:  # nothing is held back but what a stop string could begin with
            held = text[len(shown) : at]
            assert not held or any(s.startswith(held) for s in stops)
    assert (shown + strings.finish(), strings.matched) == (wanted, stop)
    if stop:
        assert strings.push("ab") == ("", True)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(UsageError, match="stop: an empty string"):
        StopStrings(("x", ""))


def test_the_http_process_imports_nothing_heavy() -> None:
    code = "import sys, pdlab.real.models.detokenize; print([m for m in ('torch', 'transformers', 'llm') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
