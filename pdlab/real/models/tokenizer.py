"""Text to token ids and back, and chats to text, exactly as transformers does it, without transformers.

A vocabulary comes from a Hugging Face folder (tokenizer.json and the files beside it) or from a GGUF file. A GGUF only names its
pre-tokenizer; how that splits text is in PRETOKENIZERS. Sources: the tokenizer.json of the models that use each, and llama.cpp's
llama-vocab.cpp for which these are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from pdlab.core.types import UsageError
from pdlab.real.models import gguf_file

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace("{1,3}", "")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2, DIGITS = "gpt-2", "digits, then gpt-2"
PRETOKENIZERS = (
    dict.fromkeys(("default", "gpt-2", "mpt", "olmo", "jais", "trillion"), GPT2)
    | dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), DIGITS)
    | dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), LLAMA3)
    | dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "hunyuan", "megrez"), QWEN2)
    | {"tekken": TEKKEN}
)
WHOLE_WORDS_FIRST = (
    "llama3",
    "llama-v3",
    "llama-bpe",
    "falcon3",
    "pixtral",
    "tekken",
)  # a word that is a token needs no merges; bos by default
NORMALISED = ("qwen2", "deepseek-r1-qwen")
END_NAMES = frozenset({"<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|endoftext|>"})
UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6  # GGUF token types
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FINAL_TAG = "PDLAB_CONTINUES_HERE "


@dataclass(frozen=True, slots=True)
class Spelling:
    """How tokens spell text. Byte-level: each character of a token stands for a byte. Else tokens are text in which `replaced`
    characters stand for others, and <0xNN> a byte; `strip` spaces are taken from the beginning of the whole, or, `bare_start`, all of
    the first token."""

    byte_level: bool
    replaced: tuple[tuple[str, str], ...] = ()
    byte_fallback: bool = False
    strip: int = 0
    bare_start: bool = False


class Tokenizer:
    """`eos_ids` end a generation; `vocab` is the number of token ids; `spelling` is for the detokenizer. No token stands for more than
    `longest_token_bytes` of text (but for runs of unknown characters in a vocabulary that makes one token of them)."""

    def __init__(
        self,
        backend: Backend,
        source: Path,
        *,
        eos_ids: frozenset[int],
        names: Mapping[str, str],
        templates: Mapping[str, str],
    ) -> None:
        """`names` are the special tokens by role (bos_token, ...)."""
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.source = source
        self.eos_ids = eos_ids
        self.spelling = _spelling(backend, source)
        self.special_ids = frozenset(id for id, token in backend.get_added_tokens_decoder().items() if token.special)
        self.vocab: int = backend.get_vocab_size()
        self.longest_token_bytes = max((len(token.encode()) for token in backend.get_vocab()), default=1)
        self._names = dict(names)
        self._templates = dict(templates)
        self._compiled: dict[str, jinja2.Template] = {}
        self._pieces: dict[int, bytes] = {}

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """From a Hugging Face folder or a .gguf file. Raises UsageError that names the file and what is wrong with it."""
        return _from_folder(path) if path.is_dir() else _from_gguf(gguf_file.read(path))

    def files(self) -> dict[str, str]:
        """The Hugging Face folder that `load` and transformers read as this one: file names, and what is in them."""
        options: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **self._names}
        found = {"tokenizer.json": self.backend.to_str(pretty=True), "special_tokens_map.json": _written(self._names)}
        if set(self._templates) == {"default"}:
            found["chat_template.jinja"] = self._templates["default"]
        elif self._templates:
            options["chat_template"] = [{"name": name, "template": text} for name, text in self._templates.items()]
        return {
            **found,
            "tokenizer_config.json": _written(options),
            "generation_config.json": _written({"eos_token_id": sorted(self.eos_ids)}),
        }

    def encode(self, text: str, special: bool = True) -> list[int]:
        """`special` adds what the model's texts begin or end with (bos); a chat's template has written that already. Special tokens' names
        in `text` become those tokens either way."""
        ids: list[int] = self.backend.encode(text, add_special_tokens=special).ids
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        text: str = self.backend.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def piece(self, id: int) -> str:
        """The token alone, as text; bytes that are no whole characters show as U+FFFD."""
        return self.piece_bytes(id).decode("utf-8", "replace")

    def piece_bytes(self, id: int) -> bytes:
        """What the token adds to a text, in UTF-8. Empty for an id that is none."""
        found = self._pieces.get(id)
        if found is None:
            token = self.backend.id_to_token(id)
            found = self._pieces[id] = b"" if token is None else _spelled(token, self.spelling)
        return found

    def is_byte(self, id: int) -> bool:
        """A token <0xNN> of a vocabulary with byte fallback."""
        return self.spelling.byte_fallback and _byte(self.backend.id_to_token(id) or "") is not None

    @property
    def template_text(self) -> str:
        """All of its chat templates."""
        return "\n".join(self._templates.values())

    @property
    def has_chat_template(self) -> bool:
        return bool(self._templates)

    def template_reads(self, name: str) -> bool:
        """Is there a chat template that names this variable?"""
        return any(re.search(rf"\b{re.escape(name)}\b", template) for template in self._templates.values())

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        continue_final: bool = False,
        **kwargs: Any,
    ) -> str:
        """The messages as the text the model was trained on, up to where the assistant speaks, or goes on speaking (`continue_final`).
        `kwargs` go to the template (enable_thinking, ...). Raises UsageError where there is no template, or with what the template says."""
        name = "tool_use" if tools is not None and "tool_use" in self._templates else "default"
        if name not in self._templates:
            has = (
                f"has chat templates {', '.join(sorted(self._templates))} but none named default"
                if self._templates
                else "has no chat template"
            )
            raise UsageError(f"model {self.source} {has}: use /v1/completions, or a model with one (chat_template.jinja)")
        if not messages:
            raise UsageError("messages is empty: give at least one message")
        chat = [_reasoning({key: value for key, value in message.items() if value is not None}) for message in messages]
        if continue_final:
            chat[-1] = _tagged(chat[-1])
        variables = {"add_generation_prompt": not continue_final, "documents": None, **self._names, **kwargs}
        try:
            if name not in self._compiled:
                self._compiled[name] = _environment().from_string(self._templates[name])
            text = self._compiled[name].render(messages=chat, tools=tools, **variables)
        except Exception as error:  # the template is the model's program: whatever it raises is about these messages
            raise UsageError(f"the chat template of model {self.source} refuses these messages: {error}") from None
        return _until_tag(text, self.source) if continue_final else text


def _written(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def _reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Templates read reasoning_content; clients call it reasoning or thinking, too."""
    found = next((message[key] for key in ("reasoning_content", "thinking", "reasoning") if key in message), None)
    return message if found is None else {"thinking": found, **message, "reasoning_content": found}


def _tagged(message: dict[str, Any]) -> dict[str, Any]:
    """With a tag after its text, at which the rendered chat is cut."""
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": content + FINAL_TAG}
    if isinstance(content, list):
        for index in range(len(content) - 1, -1, -1):
            if isinstance(content[index], Mapping) and "text" in content[index]:
                part = {**content[index], "text": content[index]["text"] + FINAL_TAG}
                return {**message, "content": [*content[:index], part, *content[index + 1 :]]}
    raise UsageError("continue_final_message: the final message has no text to continue")


def _until_tag(text: str, source: Path) -> str:
    at = text.rfind(FINAL_TAG.strip())
    if at < 0:
        raise UsageError(f"continue_final_message: the chat template of model {source} leaves out the final message")
    return text[:at] if text.startswith(FINAL_TAG, at) else text[:at].rstrip()  # a template that trims has lost the tag's space


class _Generation(Extension):
    """`{% generation %}` marks what the assistant said, for training; here it is only its content."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own declaration

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.Environment:
    """What transformers offers to chat templates."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(format: str) -> str:
        return datetime.now().strftime(format)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: printable ones stand for themselves, the others for those from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


BYTES = _byte_alphabet()


def _spelled(token: str, spelling: Spelling) -> bytes:
    if spelling.byte_level:
        return bytes(BYTES[c] for c in token) if all(c in BYTES for c in token) else token.encode()
    if spelling.byte_fallback and (byte := _byte(token)) is not None:
        return bytes((byte,))
    for old, new in spelling.replaced:
        token = token.replace(old, new)
    return token.encode()


def _byte(token: str) -> int | None:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return int(token[3:5], 16)
        except ValueError:
            return None
    return None


def _spelling(backend: Backend, source: Path) -> Spelling:
    """From the decoder's steps. Raises UsageError where they are not those of a byte-level or a SentencePiece vocabulary."""
    state: Any = backend.decoder.__getstate__() if backend.decoder is not None else '{"type": "none"}'
    outer = json.loads(state)
    steps: list[dict[str, Any]] = outer["decoders"] if outer["type"] == "Sequence" else [outer]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return Spelling(True)
    if kinds == ["Metaspace"]:
        return Spelling(False, ((steps[0]["replacement"], " "),), bare_start=steps[0].get("prepend_scheme", "always") != "never")
    order = [
        ("Replace", "ByteFallback", "Fuse", "Strip").index(kind) if kind in ("Replace", "ByteFallback", "Fuse", "Strip") else -1
        for kind in kinds
    ]
    strips = [step for step in steps if step["type"] == "Strip"]
    patterns = [step["pattern"].get("String") for step in steps if step["type"] == "Replace"]
    fit = -1 not in order and all(a < b or a == b == 0 for a, b in pairwise(order)) and None not in patterns
    if not fit or any(step["content"] != " " or step["stop"] or "Fuse" not in kinds for step in strips):
        raise UsageError(
            f"model {source}: its tokenizer's decoder {' + '.join(kinds)} is not supported, only ByteLevel and SentencePiece's"
        )
    replaced = tuple((step["pattern"]["String"], step["content"]) for step in steps if step["type"] == "Replace")
    return Spelling(False, replaced, "ByteFallback" in kinds, sum(step["start"] for step in strips))


def _json(path: Path) -> dict[str, Any]:
    """Empty where there is no such file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UsageError(f"model file {path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise UsageError(f"model file {path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise UsageError(f"model file {path} is not a JSON object")
    return found


def _from_folder(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UsageError(
            f"model {folder} has no tokenizer.json; save it there with AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # tokenizers raises no narrower type
        raise UsageError(f"model file {path} is no tokenizer: {error}") from None
    options = _json(folder / "tokenizer_config.json")
    named = _json(folder / "special_tokens_map.json") | options
    names = {name: content for name in SPECIAL_NAMES if (content := _content(named.get(name))) is not None}
    added = backend.get_added_tokens_decoder()
    listed = sorted(((int(id), token) for id, token in (options.get("added_tokens_decoder") or {}).items()), key=lambda pair: pair[0])
    for id, token in listed:
        if id not in added:
            backend.add_tokens([AddedToken(**{key: value for key, value in token.items() if not key.startswith("__")})])
    backend.add_special_tokens([AddedToken(token, special=True) for token in names.values() if backend.token_to_id(token) is None])
    end = backend.token_to_id(names["eos_token"]) if "eos_token" in names else None
    ends = set() if end is None else {end}
    for file in ("generation_config.json", "config.json"):
        ends |= set(_ids(_json(folder / file).get("eos_token_id"), folder / file))
    return Tokenizer(backend, folder, eos_ids=frozenset(ends), names=names, templates=_templates(folder, options))


def _content(token: Any) -> str | None:
    """A special token's text, which stands alone or in an object."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None


def _ids(value: Any, path: Path) -> list[int]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(id, bool) or not isinstance(id, int) for id in ids):
        raise UsageError(f"model file {path}: eos_token_id {value!r} is neither a token id nor a list of them")
    return ids


def _templates(folder: Path, options: Mapping[str, Any]) -> dict[str, str]:
    """By name; the only one is `default`. Files go before tokenizer_config.json."""
    stated = options.get("chat_template") or {}
    if isinstance(stated, list):
        stated = {str(entry["name"]): str(entry["template"]) for entry in stated}
    found = {"default": stated} if isinstance(stated, str) else dict(stated)
    files = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        files["default"] = folder / "chat_template.jinja"
    return found | {name: path.read_text(encoding="utf-8") for name, path in files.items()}


def _from_gguf(header: gguf_file.Header) -> Tokenizer:
    fields = {key.removeprefix("tokenizer.ggml."): value for key, value in header.fields.items() if key.startswith("tokenizer.ggml.")}
    tokens, model, kind = fields.get("tokens"), fields.get("model"), str(fields.get("pre", "default"))
    if not isinstance(tokens, list):
        raise UsageError(f"model file {header.path} has no vocabulary; give a .gguf with one, or a Hugging Face folder")
    try:
        if model == "gpt2":
            backend = _byte_level(fields, kind, header.path)
        elif model == "llama":
            backend = _sentencepiece(fields, header.path)
        else:
            raise UsageError(
                f"model file {header.path}: tokenizer {model!r} is not one of gpt2, llama; use the model's Hugging Face folder"
            )
    except UsageError:
        raise
    except Exception as error:  # tokenizers raises no narrower type
        raise UsageError(f"model file {header.path} has a vocabulary that does not fit together: {error}; convert it again") from None
    types = fields.get("token_type")
    typed = list(zip(tokens, types.tolist(), strict=False)) if types is not None else []
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token, type in typed if type == CONTROL])
    backend.add_tokens([AddedToken(token, normalized=False, special=False) for token, type in typed if type == USER_DEFINED])

    def of(role: str) -> list[int]:
        found = fields.get(f"{role}_token_id")
        return [found] if isinstance(found, int) and found < len(tokens) else []

    roles = {
        "bos_token": "bos",
        "eos_token": "eos",
        "unk_token": "unknown",
        "pad_token": "padding",
        "sep_token": "seperator",
        "mask_token": "mask",
    }
    names = {name: tokens[id] for name, role in roles.items() for id in of(role)}
    begins = fields.get("add_bos_token", model == "llama" or kind in WHOLE_WORDS_FIRST)
    before, after = of("bos") if begins else [], of("eos") if fields.get("add_eos_token") else []
    template = [*(f"{tokens[id]}:0" for id in before), "$A:0", *(f"{tokens[id]}:0" for id in after)]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=[(tokens[id], id) for id in {*before, *after}])
    named_ends = [id for id, (token, type) in enumerate(typed) if type == CONTROL and token in END_NAMES]
    prefix = "tokenizer.chat_template"
    templates = {
        key.removeprefix(prefix).removeprefix(".") or "default": str(text)
        for key, text in header.fields.items()
        if key.startswith(f"{prefix}.") or key == prefix
    }
    ends = frozenset([*of("eos"), *of("eot"), *of("eom"), *named_ends])
    return Tokenizer(backend, header.path, eos_ids=ends, names=names, templates=templates)


def _byte_level(fields: Mapping[str, Any], kind: str, path: Path) -> Backend:
    pattern = PRETOKENIZERS.get(kind)
    if pattern is None:
        raise UsageError(
            f"model file {path}: pre-tokenizer {kind!r} is not one of {', '.join(sorted(PRETOKENIZERS))}; "
            "use the model's Hugging Face folder"
        )
    vocab = {token: id for id, token in enumerate(fields["tokens"])}
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in fields.get("merges", []))]
    backend = Backend(BPE(vocab, merges, ignore_merges=kind in WHOLE_WORDS_FIRST))
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=bool(fields.get("add_space_prefix")), use_regex=pattern in (GPT2, DIGITS))
    if pattern == DIGITS:
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    elif pattern == GPT2:
        backend.pre_tokenizer = gpt2
    else:
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), gpt2])
    if kind in NORMALISED:
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(fields: Mapping[str, Any], path: Path) -> Backend:
    """SentencePiece's BPE: of all adjacent pairs that make a token, the one of the best score is joined first."""
    tokens, scores = fields["tokens"], fields.get("scores")
    if scores is None or len(scores) != len(tokens):
        raise UsageError(f"model file {path}: its vocabulary of {len(tokens)} tokens has no scores; convert it again")
    types = fields["token_type"].tolist() if "token_type" in fields else [1] * len(tokens)
    vocab = {token: id for id, token in enumerate(tokens)}
    unknown = int(fields.get("unknown_token_id", types.index(UNKNOWN) if UNKNOWN in types else 0))
    merges = _merges(
        [(token, score) for token, score, type in zip(tokens, scores.tolist(), types, strict=True) if type not in (UNKNOWN, CONTROL, BYTE)],
        vocab,
    )
    backend = Backend(BPE(vocab, merges, unk_token=tokens[unknown], fuse_unk=True, byte_fallback=BYTE in types))
    space = normalizers.Replace(" ", "▁")
    prefixed = bool(fields.get("add_space_prefix", True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space]) if prefixed else space
    strip = [decoders.Strip(" ", 1, 0)] if prefixed else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return backend


def _merges(pieces: Sequence[tuple[str, float]], vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    def splits() -> Iterator[tuple[float, str, str]]:
        for token, score in pieces:
            for at in range(1, len(token)):
                if token[:at] in vocab and token[at:] in vocab:
                    yield -score, token[:at], token[at:]

    ranked = sorted(splits(), key=lambda split: (split[0], -len(split[1]), -len(split[2])))
    return [(left, right) for _, left, right in ranked]
