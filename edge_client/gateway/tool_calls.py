"""Tool calls as text: how the model is told to write them, the grammar that holds it to that, and how they are read.

Two ways of writing are known, each taken from the model's own chat template where that has one:

    hermes (Qwen, Hermes)   <tool_call>\\n{"name": "f", "arguments": {...}}\\n</tool_call>, any number, text before them
    llama (Llama 3.1 on)    {"name": "f", "parameters": {...}}, one, and it is the whole answer

A model whose template knows no tools gets the first way explained in its system message.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edge_client.gateway.grammar import JSON_STYLE

TAG = re.compile(r"(</?\w+>)")
EXPLANATION = """# Tools

You may call functions to help with the request. These are their signatures:
<tools>
{tools}
</tools>

To call a function, write its name and its arguments as JSON inside these tags, and end your answer after the last call:
<tool_call>
{{"name": "function-name", "arguments": {{"argument-name": "value"}}}}
</tool_call>"""


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """One way of writing calls: `opening % name`, the arguments as a JSON object, `closing`."""

    trigger: str
    opening: str
    closing: str
    many: bool

    def begin(self, name: str) -> str:
        """Give what stands before the arguments of a call of `name`."""
        return self.opening % name


HERMES = ToolFormat("<tool_call>", '<tool_call>\n{"name": "%s", "arguments": ', "}\n</tool_call>", many=True)
LLAMA = ToolFormat('{"name": "', '{"name": "%s", "parameters": ', "}", many=False)


def format_of(template: str) -> ToolFormat | None:
    """Find the way of writing that a chat template explains to its model; None where it knows no tools or another."""
    if "tools" not in template:
        return None
    if HERMES.trigger in template:
        return HERMES
    return LLAMA if '"parameters": ' in template else None


def explain(tools: Sequence[dict[str, Any]]) -> str:
    """Describe the tools and how to call them, for a system message."""
    return EXPLANATION.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))


def write_call(name: str, arguments: object, form: ToolFormat = HERMES) -> str:
    """Write a call as the model would."""
    return form.begin(name) + json.dumps(arguments, ensure_ascii=False) + form.closing


@dataclass(frozen=True, slots=True)
class Choice:
    """What the caller lets the model do: `names` are the tools it may call; `must` rules out any other answer."""

    names: tuple[str, ...]
    must: bool
    parallel: bool


def grammar(
    form: ToolFormat,
    schemas: Mapping[str, dict[str, Any]],
    choice: Choice,
    answer: dict[str, Any] | None,
    tokens: Mapping[str, int],
) -> str:
    """Write the Lark grammar of an answer that is calls, or JSON of the schema `answer` where no call is a must.

    `tokens` are the vocabulary's added tokens: models that call tools often have one of their own for a tag.
    """
    calls = [f"call_{index}" for index in range(len(choice.names))]
    any_call = f"({' | '.join(calls)})"
    start = f'{any_call} ("\\n" {any_call})*' if form.many and choice.parallel else any_call
    lines = ["%llguidance {}", f"start: {start}" if answer is None else f"start: {start} | answer"]
    if answer is not None:
        lines.append(f"answer: {_json(answer)}")
    return "\n".join(lines + _call_rules(form, schemas, choice, tokens, from_trigger=False)) + "\n"


def grammar_behind_trigger(
    form: ToolFormat, schemas: Mapping[str, dict[str, Any]], choice: Choice, tokens: Mapping[str, int]
) -> str:
    """Write the grammar of one call, from behind `form.trigger` on."""
    any_call = " | ".join(f"call_{index}" for index in range(len(choice.names)))
    rules = _call_rules(form, schemas, choice, tokens, from_trigger=True)
    return "\n".join(["%llguidance {}", f"start: {any_call}", *rules]) + "\n"


def _call_rules(
    form: ToolFormat,
    schemas: Mapping[str, dict[str, Any]],
    choice: Choice,
    tokens: Mapping[str, int],
    *,
    from_trigger: bool,
) -> list[str]:
    rules = []
    for index, name in enumerate(choice.names):
        begin = form.begin(name).removeprefix(form.trigger)
        head = "" if from_trigger else _literal(form.trigger, tokens)
        body = f"{_literal(begin, tokens)} {_json(schemas[name])} {_literal(form.closing, tokens)}"
        rules.append(f"call_{index}: {head} {body}")
    return rules


def _literal(text: str, tokens: Mapping[str, int]) -> str:
    """Write a text; a tag in it that has a token of its own may be that token, or be spelled."""
    parts = []
    for part in TAG.split(text):
        if part in tokens:
            parts.append(f"({json.dumps(part)} | <[{tokens[part]}]>)")
        elif part:
            parts.append(json.dumps(part))
    return " ".join(parts)


def _json(schema: dict[str, Any]) -> str:
    return "%json " + json.dumps(schema | {"x-guidance": JSON_STYLE})


@dataclass(frozen=True, slots=True)
class CallPiece:
    """A piece of the call number `index`: its `name` when it begins, later more of its `arguments`."""

    index: int
    name: str | None = None
    arguments: str = ""


class CallReader:
    """Takes an answer's text apart into plain text and calls, piece by piece as it comes."""

    def __init__(self, form: ToolFormat, names: Sequence[str]) -> None:
        self._form = form
        self._begins = {form.begin(name): name for name in names}
        self._buffer = ""
        self._is_at_start = True
        self._object: _ObjectEnd | None = None
        self._closing = ""
        self.calls = 0

    @property
    def is_inside(self) -> bool:
        """Whether a call has begun and not ended."""
        return self._object is not None or bool(self._closing)

    def push(self, text: str) -> list[str | CallPiece]:
        """Take text; give what it is as far as that is clear."""
        self._buffer += text
        found: list[str | CallPiece] = []
        while self._buffer and self._step(found):
            pass
        return found

    def flush(self) -> list[str | CallPiece]:
        """Give what was held back, once no more text will come."""
        rest, self._buffer = self._buffer, ""
        # A call that was cut in its first words is no text either.
        is_cut = rest.lstrip().startswith(self._form.trigger)
        return [rest] if rest and not is_cut and not self.is_inside and (rest.strip() or not self.calls) else []

    def _step(self, found: list[str | CallPiece]) -> bool:
        if self._object is not None:
            return self._read_arguments(found, self._object)
        if self._closing:
            taken = min(len(self._closing), len(self._buffer))
            self._closing, self._buffer = self._closing[taken:], self._buffer[taken:]
            return True
        return self._read_text(found)

    def _read_arguments(self, found: list[str | CallPiece], end: _ObjectEnd) -> bool:
        size = end.find(self._buffer)
        piece, self._buffer = self._buffer[:size], self._buffer[size:]
        found.append(CallPiece(self.calls - 1, arguments=piece))
        if end.is_over:
            self._object, self._closing = None, self._form.closing
        return True

    def _read_text(self, found: list[str | CallPiece]) -> bool:
        hits = [(at, begin) for begin in self._begins if (at := self._find(begin)) >= 0]
        if hits:
            at, begin = min(hits)
            before, self._buffer = self._buffer[:at], self._buffer[at + len(begin) :]
            if before := before.rstrip():
                found.append(before)
            found.append(CallPiece(self.calls, self._begins[begin]))
            self.calls += 1
            self._object, self._is_at_start = _ObjectEnd(), False
            return True
        keep = max((self._overlap(begin) for begin in self._begins), default=0)
        shown = self._buffer[: len(self._buffer) - keep]
        # Blanks before a call are no text of the answer's; whether one comes is not known yet.
        shown = shown.rstrip() if self._form.many else shown
        if shown:
            found.append(shown)
            self._buffer = self._buffer[len(shown) :]
            self._is_at_start = False
        return False

    def _find(self, begin: str) -> int:
        if self._form.many:
            return self._buffer.find(begin)
        return 0 if self._is_at_start and self._buffer.startswith(begin) else -1

    def _overlap(self, begin: str) -> int:
        """How much of the buffer's end may still become `begin`."""
        if not self._form.many:
            return len(self._buffer) if self._is_at_start and begin.startswith(self._buffer) else 0
        longest = min(len(self._buffer), len(begin) - 1)
        return next((size for size in range(longest, 0, -1) if begin.startswith(self._buffer[-size:])), 0)


class _ObjectEnd:
    """Finds the end of a JSON object in pieces of text."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self.is_over = False

    def find(self, text: str) -> int:
        """Give how much of `text` belongs to the object."""
        for place, char in enumerate(text):
            self._take(char)
            if self.is_over:
                return place + 1
        return len(text)

    def _take(self, char: str) -> None:
        if self._escaped:
            self._escaped = False
        elif self._in_string:
            self._escaped = char == "\\"
            self._in_string = char != '"'
        elif char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            self.is_over = self._depth == 0
