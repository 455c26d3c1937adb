"""Chat templates, rendered as transformers renders them: sandboxed jinja2 with its helpers and whitespace rules."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from split_llama.errors import CheckpointError, UsageError
from split_llama.json_file import read_json

# As transformers takes them: role and content, and where the template knows them tool_calls, tool_call_id and the like.
Message = Mapping[str, Any]


def load_template(folder: Path) -> str:
    """Read the model's template: `chat_template.jinja`, else `chat_template` of `tokenizer_config.json`.

    Raises `UsageError` when the model has none.
    """
    path = folder / "chat_template.jinja"
    try:
        if path.is_file():
            return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    config_path = folder / "tokenizer_config.json"
    config = read_json(config_path) if config_path.is_file() else {}
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if not isinstance(template, str):
        raise UsageError(
            "this model has no chat template, so it cannot chat; give it a prompt to continue instead, without --chat"
        )
    return template


class _Generation(Extension):
    """`{% generation %}` marks the answer for training; here its body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 - declared by jinja2

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A compiled template; one object may be used by several threads at once."""

    source: str
    _compiled: Template

    @classmethod
    def compile(cls, source: str) -> ChatTemplate:
        """Read a template. Raises `UsageError` when it is none."""
        extensions = [_Generation, loopcontrols]
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
        try:
            return cls(source, environment.from_string(source))
        except TemplateError as error:
            raise UsageError(f"the model's chat template refuses these messages: {error}") from error

    def render(
        self,
        messages: Sequence[Message],
        special_tokens: Mapping[str, str],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """Render as the function `render` does; `options` are further names that the template may use."""
        # transformers always gives all of these names, None where there is nothing.
        given = {"messages": list(messages), "tools": tools, "documents": None, "add_generation_prompt": True}
        try:
            return self._compiled.render(**{**(options or {}), **special_tokens, **given})
        except TemplateError as error:
            raise UsageError(f"the model's chat template refuses these messages: {error}") from error
        except (TypeError, ValueError, KeyError, ArithmeticError, AttributeError, RecursionError) as error:
            raise UsageError(f"the model's chat template cannot be rendered: {error}") from error


def render(
    template: str,
    messages: Sequence[Message],
    special_tokens: Mapping[str, str],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """Render `messages` and the header of the answer; `special_tokens` holds `bos_token`, `eos_token` and the like.

    `tools` are functions as OpenAI's API describes them; a template without support for them leaves them out.
    Raises `UsageError` with what the template says.
    """
    return ChatTemplate.compile(template).render(messages, special_tokens, tools=tools)


def _tojson(value: Any, indent: int | None = None, ensure_ascii: bool = False, **options: Any) -> str:
    # Jinja's own filter escapes for HTML, which a prompt must not be.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise(message: str) -> None:
    raise TemplateError(message)
