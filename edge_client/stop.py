"""Stop strings over a stream of text: hold back what may still become one."""

from __future__ import annotations

from collections.abc import Iterable


class StopStrings:
    """Finds the first stop string in streamed text, also across pieces; the stop string itself is never given out."""

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.found: str | None = None

    def push(self, piece: str) -> str:
        """Take a piece of text and give what is safe to show; nothing after a stop string was found."""
        if self.found is not None:
            return ""
        text = self._held + piece
        hits = [(text.index(stop), stop) for stop in self._stops if stop in text]
        if hits:
            at, self.found = min(hits, key=lambda hit: (hit[0], -len(hit[1])))
            self._held = ""
            return text[:at]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """Give what was held back, once no more text will come."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`, less than all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
