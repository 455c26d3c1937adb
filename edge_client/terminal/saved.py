"""Conversations in files. They hold the text as it is, so nothing but /save writes one, readable by its owner alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edge_client.state_files import write_atomically
from edge_client.terminal.conversation import Conversation, from_messages
from split_llama.errors import UsageError

FORMAT = "fl-llama chat"
VERSION = 1


def save(conversation: Conversation, name: str, model: str) -> Path:
    """Write the conversation, readable by its owner only; give the file's path. Raises `UsageError`.

    A file that is there already is replaced only if it is a saved conversation.
    """
    path = Path(name).expanduser()
    if path.exists():
        _read(path)
    content = {
        "format": FORMAT,
        "version": VERSION,
        "model": model,
        "messages": conversation.messages(),
        "stopped": [exchange.stopped for exchange in conversation.exchanges],
    }
    try:
        write_atomically(path, json.dumps(content, ensure_ascii=False, indent=1).encode() + b"\n")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def load(name: str) -> Conversation:
    """Read a conversation. Raises `UsageError`."""
    path = Path(name).expanduser()
    content = _read(path)
    messages, stopped = content.get("messages"), content.get("stopped")
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        raise UsageError(f"{path}: expected a list of messages with role and content")
    if not isinstance(stopped, list) or not all(isinstance(cut, bool) for cut in stopped):
        raise UsageError(f"{path}: expected a list 'stopped' of true and false")
    try:
        return from_messages(messages, stopped)
    except UsageError as error:
        raise UsageError(f"{path}: {error.message}") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError:
        content = None
    if not isinstance(content, dict) or (content.get("format"), content.get("version")) != (FORMAT, VERSION):
        raise UsageError(f"{path} is no conversation that /save wrote (format {FORMAT!r}, version {VERSION})")
    return content


def _is_message(message: object) -> bool:
    return (
        isinstance(message, dict)
        and set(message) == {"role", "content"}
        and all(isinstance(value, str) for value in message.values())
    )
