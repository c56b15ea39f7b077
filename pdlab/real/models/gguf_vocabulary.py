"""A GGUF file's vocabulary as a tokenizer. A GGUF only names its pre-tokenizer; how that splits text is in PRETOKENIZERS. Sources: the
tokenizer.json of the models that use each, and llama.cpp's llama-vocab.cpp for which these are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from pdlab.core.types import UsageError
from pdlab.real.models import gguf_file
from pdlab.real.models.folder_vocabulary import TokenizerParts

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


def of_gguf(header: gguf_file.Header) -> TokenizerParts:
    """Raises UsageError that names the file and what is wrong with it."""
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
    return TokenizerParts(backend, header.path, ends, names, templates)


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
