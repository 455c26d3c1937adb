"""`docs/protocol.md` says what the code does."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from wire.make_golden import FOLDER

from split_llama.errors import all_errors
from split_llama.wire.codec import Codec
from split_llama.wire.control import ErrorPayload, Fork, Grant, Hello, HelloReply, Moved, Open
from split_llama.wire.frame import Flag, Kind

PAGE = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text(encoding="utf-8")
FRAMES: list[dict[str, Any]] = json.loads((FOLDER / "frames.json").read_text(encoding="utf-8"))
DUMPS: list[tuple[str, str]] = re.findall(r"```hex ([\w-]+)\n(.*?)```", PAGE, re.DOTALL)


def table(heading: str) -> list[list[str]]:
    """The cells of the rows of the table whose head row starts with these cells."""
    body = PAGE[PAGE.index(f"| {heading} |") :].split("\n\n")[0]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in body.splitlines()[2:]]


def test_the_error_table_lists_every_class() -> None:
    listed = {(int(code), name, int(status), close) for code, name, status, close, _ in table("code | class")}
    assert listed == {(cls.code, cls.__name__, cls.status, str(cls.close_code or "")) for cls in all_errors()}


def test_kinds_flags_and_codecs_are_listed() -> None:
    assert [(int(row[0]), row[1]) for row in table("kind | name")] == [(kind.value, kind.name) for kind in Kind]
    assert [(int(row[0]), row[1]) for row in table("flag | name")] == [(flag.value, flag.name) for flag in Flag]
    assert [row[0] for row in table("codec | bytes of one row of `d` values")] == [
        f"{codec.value} {codec.label}" for codec in Codec
    ]


@pytest.mark.parametrize("vector", FRAMES, ids=lambda vector: str(vector["name"]))
def test_the_offsets_of_the_header_table_read_the_golden_frames(vector: dict[str, Any]) -> None:
    frame = bytes.fromhex(vector["frame"])
    header = {
        name: int.from_bytes(frame[int(offset) : int(offset) + int(size)], "little")
        for offset, size, name, _ in table("offset")
    }
    assert (header.pop("magic"), header.pop("version")) == (0x4C46, 1)
    assert header.pop("length") == len(frame) - 32
    assert header.pop("kind") == Kind[vector["kind"]]
    assert header == {name: vector[name] for name in header}
    assert len(header) == 8


@pytest.mark.parametrize(
    ("title", "model"),
    [
        ("Hello", Hello),
        ("HelloReply", HelloReply),
        ("Open", Open),
        ("Grant", Grant),
        ("Fork", Fork),
        ("Error", ErrorPayload),
    ],
)
def test_every_field_of_a_payload_is_listed(title: str, model: type[Any]) -> None:
    section = PAGE[PAGE.index(f"**{title}** (") :]
    section = section[section.index("| field |") :].split("\n\n")[0]
    listed = [name for row in section.splitlines()[2:] for name in row.split("|")[1].strip().split(", ")]
    assert listed == list(model.model_fields)
    assert list(Moved.model_fields) == ["address"]


@pytest.mark.parametrize(("name", "dump"), DUMPS, ids=[name for name, _ in DUMPS])
def test_the_annotated_exchange_is_the_golden_one(name: str, dump: str) -> None:
    written = "".join(line[6:53].replace(" ", "") for line in dump.splitlines())
    assert written == next(vector["frame"] for vector in FRAMES if vector["name"] == name)


def test_the_exchange_is_complete() -> None:
    assert [name for name, _ in DUMPS] == ["hello", "open", "step", "open-grant", "reply", "step-last", "close"]
