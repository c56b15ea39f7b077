"""Text to token ids and back, exactly as transformers does it, without transformers: a vocabulary comes from a Hugging Face folder
(tokenizer.json and the files beside it) or from a GGUF file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pdlab.real.models import gguf_file
from pdlab.real.models.chat_templates import ChatTemplates
from pdlab.real.models.folder_vocabulary import TokenizerParts, of_folder
from pdlab.real.models.gguf_vocabulary import of_gguf
from pdlab.real.models.spelling import byte_of, spelling_of


class Tokenizer:
    """`eos_ids` end a generation; `vocab` is the number of token ids; `spelling` is for the detokenizer, `templates` make text of chats. No
    token stands for more than `longest_token_bytes` of text (but for runs of unknown characters in a vocabulary that makes one token of
    them)."""

    def __init__(self, parts: TokenizerParts) -> None:
        backend = self.backend = parts.backend
        backend.no_truncation()
        backend.no_padding()
        self.source, self.eos_ids = parts.source, parts.eos_ids
        self.spelling = spelling_of(backend, self.source)
        self.special_ids = frozenset(id for id, token in backend.get_added_tokens_decoder().items() if token.special)
        self.vocab: int = backend.get_vocab_size()
        self.longest_token_bytes = max((len(token.encode()) for token in backend.get_vocab()), default=1)
        self.templates = ChatTemplates(parts.templates, parts.names, self.source)
        self._names = dict(parts.names)
        self._pieces: dict[int, bytes] = {}

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """From a Hugging Face folder or a .gguf file. Raises UsageError that names the file and what is wrong with it."""
        return cls(of_folder(path) if path.is_dir() else of_gguf(gguf_file.read(path)))

    def files(self) -> dict[str, str]:
        """The Hugging Face folder that `load` and transformers read as this one: file names, and what is in them."""
        options: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **self._names}
        found = {"tokenizer.json": self.backend.to_str(pretty=True), "special_tokens_map.json": _written(self._names)}
        if set(self.templates.texts) == {"default"}:
            found["chat_template.jinja"] = self.templates.texts["default"]
        elif self.templates:
            options["chat_template"] = [{"name": name, "template": text} for name, text in self.templates.texts.items()]
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
            found = self._pieces[id] = b"" if token is None else self.spelling.bytes_of(token)
        return found

    def is_byte(self, id: int) -> bool:
        """A token <0xNN> of a vocabulary with byte fallback."""
        return self.spelling.byte_fallback and byte_of(self.backend.id_to_token(id) or "") is not None


def _written(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"
