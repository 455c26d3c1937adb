"""Text for a terminal. What a model or a server writes is text, never an order to the terminal (titles, clipboard)."""

from __future__ import annotations

from typing import TextIO

# Each is shown as what it is not; a carriage return is left out.
CONTROLS = {code: "\ufffd" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"} | {0x0D: ""}


def printable(text: str) -> str:
    """Give `text` without control characters, newline and tab excepted."""
    return text.translate(CONTROLS)


def for_stream(text: str, stream: TextIO) -> str:
    """Give an answer's text as it may be written to `stream`: to a terminal without control characters."""
    return printable(text) if stream.isatty() else text
