"""From messages and tools to the model's token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from edge_client.chat_template import ChatTemplate, load_template
from edge_client.gateway.messages import without_tools
from edge_client.gateway.tool_calls import HERMES, ToolFormat, format_of
from edge_client.model_source import ModelSource
from edge_client.tokenizer import EdgeTokenizer

Tools = Sequence[dict[str, Any]]


class ChatPrompts:
    """The chat template of one model, read when it is needed first. Every method is blocking and may run in threads."""

    def __init__(self, source: ModelSource, tokenizer: EdgeTokenizer) -> None:
        self._folder = source.folder
        self._tokenizer = tokenizer

    @cached_property
    def template(self) -> ChatTemplate:
        """The model's template. Raises `UsageError` for a model that has none."""
        return ChatTemplate.compile(load_template(self._folder))

    @property
    def tool_format(self) -> ToolFormat:
        """How this model writes tool calls."""
        return format_of(self.template.source) or HERMES

    def text(
        self, messages: Sequence[Mapping[str, Any]], tools: Tools | None, options: Mapping[str, Any] | None
    ) -> str:
        """Render the messages and the header of the answer. Raises `UsageError`."""
        template, special = self.template, self._tokenizer.special_tokens
        if format_of(template.source) is not None:
            return template.render(messages, special, tools=tools or None, options=options)
        return template.render(without_tools(messages, tools or ()), special, options=options)

    def ids(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Tools | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Do the same and tokenise it."""
        return self._tokenizer.encode(self.text(messages, tools, options), special_tokens=False)
