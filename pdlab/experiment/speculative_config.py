"""vLLM's `--speculative-config`, as `engine.speculation` of the experiment file has it. Knows no pydantic."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pdlab.core.types import UsageError, nearest

EXAMPLE = '{"method": "ngram", "num_speculative_tokens": 4}'
KEYS = {
    "method": "method",
    "num_speculative_tokens": "tokens",
    "model": "model",
    "prompt_lookup_min": "prompt_lookup_min",
    "prompt_lookup_max": "prompt_lookup_max",
}
ONE = "draft_tensor_parallel_size"  # pdlab's drafts are one rank's
METHODS = ("ngram", "draft_model")


def plain(text: str, methods: Sequence[str] = METHODS) -> dict[str, Any]:
    """The keys of `engine.speculation`, not checked yet. Raises UsageError."""
    try:
        config = json.loads(text)
        assert isinstance(config, dict)
    except (ValueError, AssertionError, RecursionError):
        raise UsageError(f"{text[:100]!r} is not JSON such as {EXAMPLE}") from None
    found = {}
    for key, value in config.items():
        if key == ONE and value == 1 and not isinstance(value, bool):
            continue
        if key not in KEYS:
            raise UsageError(f"{key} is not supported{nearest(key, list(KEYS))}; it has {', '.join([*KEYS, ONE + ' (1)'])}")
        found[KEYS[key]] = value
    if "method" not in found:
        found["method"] = "draft_model" if found.get("model") else "ngram"
    if found["method"] not in methods:
        raise UsageError(f"method {found['method']!r} is not one of {', '.join(methods)}{nearest(str(found['method']), methods)}")
    return found
