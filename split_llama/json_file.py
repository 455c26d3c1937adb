"""JSON objects from files one does not trust: whatever is malformed raises a `CheckpointError` naming the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from split_llama.errors import CheckpointError

MAX_JSON_BYTES = 256 * 1024 * 1024  # a tokenizer.json reaches 30 MB


def read_json(file: Path) -> dict[str, Any]:
    """Parse the JSON object in `file`."""
    try:
        if file.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{file} has more than {MAX_JSON_BYTES} bytes: it is not the JSON file expected")
        text = file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error
    return parse_json(text, str(file))


def parse_json(text: bytes, what: str) -> dict[str, Any]:
    """Parse `text` as one JSON object without repeated keys; `what` names it in the error."""
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_without_repetition)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} must be a JSON object, found {type(value).__name__}")
    return value


def brief(value: object) -> str:
    """Show a parsed value in an error message: short, and safe for hostile values (huge or deeply nested)."""
    if isinstance(value, list) and len(value) <= 8 and all(isinstance(item, int | float | str) for item in value):
        return f"{value!r:.120}"
    return f"a {type(value).__name__}" if isinstance(value, dict | list) else f"{value!r:.120}"


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is given twice")
    return value
