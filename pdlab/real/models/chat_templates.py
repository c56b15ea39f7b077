"""Chats to text, exactly as transformers does it, without transformers: a model's own templates."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pdlab.core.types import UsageError

FINAL_TAG = "PDLAB_CONTINUES_HERE "


class ChatTemplates:
    """`texts` by name, the only one is `default`; there may be none. `names` are the special tokens by role (bos_token, ...), `source` is
    the model's file or folder."""

    def __init__(self, texts: Mapping[str, str], names: Mapping[str, str], source: Path) -> None:
        self.texts, self._names, self._source = dict(texts), dict(names), source
        self._compiled: dict[str, jinja2.Template] = {}

    def __bool__(self) -> bool:
        return bool(self.texts)

    @property
    def text(self) -> str:
        """All of them."""
        return "\n".join(self.texts.values())

    def reads(self, name: str) -> bool:
        """Is there one that names this variable?"""
        return any(re.search(rf"\b{re.escape(name)}\b", text) for text in self.texts.values())

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
        name = "tool_use" if tools is not None and "tool_use" in self.texts else "default"
        if name not in self.texts:
            has = f"has chat templates {', '.join(sorted(self.texts))} but none named default" if self.texts else "has no chat template"
            raise UsageError(f"model {self._source} {has}: use /v1/completions, or a model with one (chat_template.jinja)")
        if not messages:
            raise UsageError("messages is empty: give at least one message")
        chat = [_reasoning({key: value for key, value in message.items() if value is not None}) for message in messages]
        if continue_final:
            chat[-1] = _tagged(chat[-1])
        variables = {"add_generation_prompt": not continue_final, "documents": None, **self._names, **kwargs}
        try:
            if name not in self._compiled:
                self._compiled[name] = _environment().from_string(self.texts[name])
            text = self._compiled[name].render(messages=chat, tools=tools, **variables)
        except Exception as error:  # the template is the model's program: whatever it raises is about these messages
            raise UsageError(f"the chat template of model {self._source} refuses these messages: {error}") from None
        return _until_tag(text, self._source) if continue_final else text


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
