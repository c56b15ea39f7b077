"""Fields of vLLM's, OpenAI's and other servers' APIs that would change an answer, and are not had here: a request with one is refused
by its name, never answered as though it were not there. A field that is in no such API is ignored, as vLLM does; so is what changes no
answer (user, metadata, store, service_tier, prediction, ...)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, ClassVar

import msgspec

from pdlab.real.api.errors import bad


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why, and the values that ask for nothing (beside null)."""

    why: str
    harmless: tuple[Any, ...] = ()

    def asks_for_nothing(self, value: object) -> bool:
        return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in self.harmless)


class Refusals(Mapping[str, Refusal]):
    """By field. That a body has none of them is seen at one look: most have none."""

    def __init__(self, by_name: Mapping[str, Refusal]) -> None:
        self._by_name = by_name
        self._values = attrgetter(*by_name)
        self._none = (None,) * len(by_name)

    def __getitem__(self, name: str) -> Refusal:
        return self._by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    def check(self, body: RefusedFields) -> None:
        """Raises ApiError naming the first field that asks for what is not had."""
        values = self._values(body)
        if values == self._none:
            return
        for (name, refusal), value in zip(self._by_name.items(), values, strict=True):
            if value is not None and not refusal.asks_for_nothing(value):
                raise bad(f"{name} {refusal.why}", name)


OF_OTHERS: Mapping[str, Refusal] = {  # SGLang, llama.cpp, TGI and their kin: what it is called here, or that it is not had
    **{name: Refusal("is not known here: give max_tokens") for name in ("max_new_tokens", "n_predict", "num_predict")},
    "min_new_tokens": Refusal("is not known here: give min_tokens", (0,)),
    **{name: Refusal("is not known here: give stop", ([],)) for name in ("stop_sequences", "stop_strings")},
    "stop_regex": Refusal("is not supported: give stop", ([], "")),
    "no_stop_trim": Refusal("is not known here: give include_stop_str_in_output", (False,)),
    "regex": Refusal("is not known here: give guided_regex"),
    "ebnf": Refusal("is not known here: give guided_grammar"),
    "grammar": Refusal("is not known here: give guided_grammar", ("",)),
    "json_schema": Refusal("is not known here: give response_format or guided_json"),
    "repeat_penalty": Refusal("is not known here: give repetition_penalty", (1,)),
    "typical_p": Refusal("is not supported: give top_p", (0, 1)),
    "tfs_z": Refusal("is not supported: give top_p", (1,)),
    "mirostat": Refusal("is not supported: give temperature", (0,)),
    **{name: Refusal("is not supported: leave it out", (0,)) for name in ("top_a", "xtc_probability", "dry_multiplier", "dynatemp_range")},
    **{name: Refusal("is not supported: leave it out", ("",)) for name in ("lora_path", "custom_logit_processor")},
    "repetition_detection": Refusal("is not supported: give repetition_penalty"),
}
CHAT, COMPLETION = "is for /v1/chat/completions", "is for /v1/completions"

ANYWHERE = Refusals(
    {
        "use_beam_search": Refusal("is not supported: leave it out, or take best_of", (False,)),
        "length_penalty": Refusal("belongs to beam search, which is not supported", (1,)),
        "early_stopping": Refusal("belongs to beam search, which is not supported", (False,)),
        "logits_processors": Refusal("is not supported: no code comes with a request", ([],)),
        "vllm_xargs": Refusal("is not supported: there are no extensions to take it", ({},)),
        "cache_salt": Refusal("is not supported: start a server for each tenant"),
        "chat_template": Refusal("is not taken from a request: put it beside the model (chat_template.jinja)"),
        "mm_processor_kwargs": Refusal("is not supported: the models here take text alone", ({},)),
        "thinking_token_budget": Refusal("is not supported: give max_tokens"),
        "truncation_side": Refusal("can only be left: a prompt is cut at its beginning", ("left",)),
        "suffix": Refusal("is not supported: the models here only go on from a prompt", ("",)),
        **OF_OTHERS,
    }
)
IN_COMPLETIONS = Refusals(
    {
        **ANYWHERE,
        "prompt_embeds": Refusal("is not supported: give text or token ids"),
        "messages": Refusal(CHAT),
        "max_completion_tokens": Refusal(f"{CHAT}: give max_tokens here"),
        "top_logprobs": Refusal(f"{CHAT}: give logprobs here"),
        "tools": Refusal(CHAT, ([],)),
        "chat_template_kwargs": Refusal(CHAT, ({},)),
        "add_generation_prompt": Refusal(CHAT, (True,)),
        "continue_final_message": Refusal(CHAT, (False,)),
        "documents": Refusal(CHAT, ([],)),
        "reasoning_effort": Refusal(CHAT),
    }
)
IN_CHATS = Refusals(
    {
        **ANYWHERE,
        "prompt": Refusal(f"{COMPLETION}: give messages here"),
        "best_of": Refusal(f"{COMPLETION}: give n here", (1,)),
        "echo": Refusal(COMPLETION, (False,)),
        "functions": Refusal("is not supported: give tools", ([],)),
        "function_call": Refusal("is not supported: give tool_choice", ("none", "auto")),
        "modalities": Refusal("can only be text", (["text"],)),
        "audio": Refusal("is not supported: answers are text"),
        "web_search_options": Refusal("is not supported: nothing here searches the web"),
        "verbosity": Refusal("can only be medium: the models here know no other", ("medium",)),
        "include_reasoning": Refusal("can only be true: reasoning is not told from the rest of the text", (True,)),
    }
)


class RefusedFields(msgspec.Struct, frozen=True, kw_only=True):
    """What may be refused, so that it is read; None: not given. A request that has a field of this name says what it is."""

    use_beam_search: Any = None
    length_penalty: Any = None
    early_stopping: Any = None
    logits_processors: Any = None
    vllm_xargs: Any = None
    cache_salt: Any = None
    chat_template: Any = None
    mm_processor_kwargs: Any = None
    thinking_token_budget: Any = None
    truncation_side: Any = None
    suffix: Any = None
    prompt_embeds: Any = None
    prompt: Any = None
    messages: Any = None
    best_of: Any = None
    echo: Any = None
    max_completion_tokens: Any = None
    top_logprobs: Any = None
    tools: Any = None
    chat_template_kwargs: Any = None
    add_generation_prompt: Any = None
    continue_final_message: Any = None
    documents: Any = None
    reasoning_effort: Any = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    web_search_options: Any = None
    verbosity: Any = None
    include_reasoning: Any = None
    max_new_tokens: Any = None
    n_predict: Any = None
    num_predict: Any = None
    min_new_tokens: Any = None
    stop_sequences: Any = None
    stop_strings: Any = None
    stop_regex: Any = None
    no_stop_trim: Any = None
    regex: Any = None
    ebnf: Any = None
    grammar: Any = None
    json_schema: Any = None
    repeat_penalty: Any = None
    typical_p: Any = None
    tfs_z: Any = None
    mirostat: Any = None
    top_a: Any = None
    xtc_probability: Any = None
    dry_multiplier: Any = None
    dynatemp_range: Any = None
    lora_path: Any = None
    custom_logit_processor: Any = None
    repetition_detection: Any = None

    refusals: ClassVar[Refusals]
