"""JSON lines from files one does not trust: every refusal names the file, the line, what was expected and what came."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from split_llama.errors import UsageError
from split_llama.json_file import brief

MAX_LINE_BYTES = 16 * 1024 * 1024  # the longest story of any of these data sets has a few hundred KB


@dataclass(frozen=True, slots=True)
class Fields:
    """One JSON object of a data file; `where` names file and line for the errors, `path` the object inside the line."""

    raw: Mapping[str, Any]
    where: str
    path: str = ""

    def has(self, *names: str) -> bool:
        """Whether all these fields are there."""
        return all(name in self.raw for name in names)

    def text(self, name: str) -> str:
        """A text that is not empty."""
        value = self.any_text(name)
        if not value.strip():
            raise self.refusal(name, "a text that is not empty", value)
        return value

    def any_text(self, name: str) -> str:
        """A text, empty or not."""
        value = self._get(name, "a text")
        if not isinstance(value, str):
            raise self.refusal(name, "a text", value)
        return self._valid(name, value)

    def child(self, name: str) -> Fields:
        """An object."""
        value = self._get(name, "an object")
        if not isinstance(value, dict):
            raise self.refusal(name, "an object", value)
        return Fields(value, self.where, self._inner(name))

    def children(self, name: str) -> list[Fields]:
        """A list of objects, not empty."""
        items = self.items(name)
        for number, item in enumerate(items):
            if not isinstance(item, dict):
                raise self.refusal(f"{name}[{number}]", "an object", item)
        return [Fields(item, self.where, f"{self._inner(name)}[{number}]") for number, item in enumerate(items)]

    def texts(self, name: str) -> list[str]:
        """A list of texts, not empty."""
        items = self.items(name)
        for number, item in enumerate(items):
            if not isinstance(item, str) or not item.strip():
                raise self.refusal(f"{name}[{number}]", "a text that is not empty", item)
            self._valid(f"{name}[{number}]", item)
        return items

    def items(self, name: str) -> list[Any]:
        """A list that is not empty."""
        value = self._get(name, "a list")
        if not isinstance(value, list) or not value:
            raise self.refusal(name, "a list that is not empty", value)
        return value

    def whole(self, name: str) -> int:
        """A whole number >= 0."""
        value = self._get(name, "a whole number >= 0")
        if type(value) is not int or value < 0:
            raise self.refusal(name, "a whole number >= 0", value)
        return value

    def label(self, *names: str) -> int:
        """Which of `names` the field `label` is: its name, its number, or JSON's own false and true."""
        expected = " or ".join(repr(name) for name in names) + f" (or its number, 0 to {len(names) - 1})"
        value = self._get("label", expected)
        if isinstance(value, bool) and names == ("false", "true"):
            return int(value)
        if type(value) is int and 0 <= value < len(names):
            return value
        if isinstance(value, str) and value.lower() in names:
            return names.index(value.lower())
        raise self.refusal("label", f"{expected}; splits without labels cannot be trained on or scored", value)

    def identity(self, name: str) -> str:
        """A number or a name that tells objects apart."""
        value = self._get(name, "a number or a text")
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise self.refusal(name, "a number or a text", value)
        return str(value)

    def refusal(self, name: str, expected: str, came: object) -> UsageError:
        """The error about the field `name`."""
        return UsageError(f"{self.where}: {self._inner(name)!r} must be {expected}, found {brief(came)}")

    def _valid(self, name: str, text: str) -> str:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise self.refusal(name, "valid text, without half a surrogate pair", text) from None
        return text

    def _get(self, name: str, expected: str) -> Any:
        if name not in self.raw:
            there = ", ".join(map(repr, list(self.raw)[:12])) or "none"
            place = f" in {self.path!r}" if self.path else ""
            raise UsageError(f"{self.where}: {name!r} is missing{place}, {expected} was expected; fields: {there:.200}")
        return self.raw[name]

    def _inner(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file that are not blank, with their numbers from 1, one at a time.

    Raises `UsageError` for a file that cannot be read, a line that is not UTF-8 and one of over 16 MiB.
    """
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise UsageError(
                        f"{path}, line {number}: over {MAX_LINE_BYTES} bytes; one example a line is expected"
                    )
                text = _utf8(line, f"{path}, line {number}")
                if text.strip():
                    yield number, text
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from None


def json_lines(path: Path) -> Iterator[Fields]:
    """The objects of a JSON-lines file, one at a time. Raises `UsageError` as `numbered_lines` and `parse_line` do."""
    for number, line in numbered_lines(path):
        yield parse_line(line, f"{path}, line {number}")


def parse_line(line: str, where: str) -> Fields:
    """One line as a JSON object. Raises `UsageError` that begins with `where`."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: one JSON object a line is expected, but this is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise UsageError(f"{where}: a JSON object is expected, found {brief(value)}")
    return Fields(value, where)


def _utf8(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{where}: UTF-8 is expected, byte {error.start} is not: {error.reason}") from None
