"""Messages of the API as the chat templates take them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from edge_client.gateway.errors import ApiError
from edge_client.gateway.requests import ChatMessage, TextPart, ToolCall
from edge_client.gateway.tool_calls import explain, write_call

Plain = dict[str, Any]


def to_template(messages: Sequence[ChatMessage]) -> list[Plain]:
    """Give messages as transformers' templates expect them: content as one text, call arguments as objects.

    Raises `ApiError` that names what cannot be used.
    """
    return [_convert(message, f"messages.{place}") for place, message in enumerate(messages)]


def _convert(message: ChatMessage, place: str) -> Plain:
    # OpenAI's newer models call the system message after the developer; templates know one name.
    role = "system" if message.role == "developer" else message.role
    calls = message.tool_calls or []
    if calls and role != "assistant":
        raise ApiError(f"{place}: only an assistant's message has tool_calls", param=f"{place}.tool_calls")
    if message.content is None and not calls:
        raise ApiError(f"{place}: content is missing", param=f"{place}.content")
    plain: Plain = {"role": role, "content": _text(message.content, f"{place}.content")}
    if message.name is not None:
        plain["name"] = message.name
    if message.tool_call_id is not None:
        plain["tool_call_id"] = message.tool_call_id
    if calls:
        plain["tool_calls"] = [_call(call, f"{place}.tool_calls.{index}") for index, call in enumerate(calls)]
    return plain


def _text(content: str | list[TextPart] | None, place: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for index, part in enumerate(content):
        if part.type not in ("text", "input_text", "output_text", "refusal") or part.text is None:
            param = f"{place}.{index}.type"
            raise ApiError(f"{param}: parts of type {part.type!r} cannot be used, this model reads text", param=param)
        texts.append(part.text)
    return "\n".join(texts)


def _call(call: ToolCall, place: str) -> Plain:
    param = f"{place}.function.arguments"
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise ApiError(f"{param}: expected a JSON object as text", param=param)
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


def without_tools(messages: Sequence[Mapping[str, Any]], tools: Sequence[Plain]) -> list[Plain]:
    """Put tools, calls and their results into plain messages, for a template that knows none of them."""
    plain = [_flatten(message) for message in messages]
    if not tools:
        return plain
    if plain and plain[0]["role"] == "system":
        plain[0]["content"] = f"{plain[0]['content']}\n\n{explain(tools)}"
        return plain
    return [{"role": "system", "content": explain(tools)}, *plain]


def _flatten(message: Mapping[str, Any]) -> Plain:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    plain = dict(message)
    calls = plain.pop("tool_calls", [])
    written = [write_call(call["function"]["name"], call["function"]["arguments"]) for call in calls]
    plain["content"] = "\n".join(part for part in (plain["content"], *written) if part)
    return plain
