"""What a tokenizer is made of, and how a Hugging Face folder tells it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from pdlab.core.json_file import json_object
from pdlab.core.types import UsageError

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True, eq=False)
class TokenizerParts:
    """`eos_ids` end a generation, `names` are the special tokens by role (bos_token, ...), `templates` those of chats by name."""

    backend: Backend
    source: Path
    eos_ids: frozenset[int]
    names: Mapping[str, str]
    templates: Mapping[str, str]


def of_folder(folder: Path) -> TokenizerParts:
    """Raises UsageError that names the file and what is wrong with it."""
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
    return TokenizerParts(backend, folder, frozenset(ends), names, _templates(folder, options))


def _json(path: Path) -> dict[str, Any]:
    """Empty where there is no such file."""
    return json_object(path, "model file") if path.exists() else {}


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
