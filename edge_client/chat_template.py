"""Chat templates, rendered as transformers renders them: sandboxed jinja2 with its helpers and whitespace rules."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from split_llama.errors import CheckpointError, UsageError
from split_llama.json_file import read_json

Message = dict[str, str]


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
            "this model has no chat template, so --chat cannot be used; leave it out to continue the prompt"
        )
    return template


class _Generation(Extension):
    """`{% generation %}` marks the answer for training; here its body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 - declared by jinja2

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def render(template: str, messages: Sequence[Message], special_tokens: Mapping[str, str]) -> str:
    """Render `messages` and the header of the answer; `special_tokens` holds `bos_token`, `eos_token` and the like.

    Raises `UsageError` with what the template says.
    """
    extensions = [_Generation, loopcontrols]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    try:
        compiled = environment.from_string(template)
        return compiled.render(messages=list(messages), add_generation_prompt=True, **special_tokens)
    except TemplateError as error:
        raise UsageError(f"the model's chat template refuses these messages: {error}") from error
    except (TypeError, ValueError, KeyError, ArithmeticError, AttributeError) as error:
        raise UsageError(f"the model's chat template cannot be rendered: {error}") from error


def _tojson(value: Any, indent: int | None = None, ensure_ascii: bool = False, **options: Any) -> str:
    # Jinja's own filter escapes for HTML, which a prompt must not be.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise(message: str) -> None:
    raise TemplateError(message)
