"""Whole data files: broken, huge, published, and those that the page about them shows."""

from __future__ import annotations

import json
import re
import tracemalloc
from pathlib import Path

import pytest

from split_llama.errors import UsageError
from training.tasks.examples import Example
from training.tasks.readers import read_task, recognise, task_names


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"prompt": "a", "response": "b"}\n\n{"prompt": \n', "line 3: one JSON object a line is expected"),
        (b'{"prompt": "a", "response": "b"}\n\xff\xfe\n', "line 2: UTF-8 is expected, byte 0 is not"),
        (b"[" * 100_000 + b"\n", "line 1: one JSON object a line is expected"),
        (b"", "holds no examples"),
        (b"\n \n", "holds no examples"),
        (b"x" * (16 * 1024 * 1024 + 1), "line 1: over 16777216 bytes"),
    ],
)
def test_broken_files_are_refused(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=said):
        list(read_task("pairs", path))


def test_blank_lines_and_a_byte_order_mark_do_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a", "response": "b"}\r\n\r\n{"prompt": "c", "response": "d"}')
    assert list(read_task("auto", path)) == [Example("a", "b"), Example("c", "d")]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"foo": 1, "bar": 2}', "no task has lines with these fields: 'foo', 'bar'"),
        ("a.jsonl", "Once upon a time", "line 1: a JSON object is expected, found 'Once upon a time'"),
        ("a.jsonl", '{"premise": "a", "hypothesis": "b", "label": "entailment"}', "cb or of rte"),
        ("a.jsonl", "", "holds no examples"),
        ("a.json", '{"version": 1}', "'data' is missing"),
        ("a.json", "[1", "CoQA's file is one object"),
    ],
)
def test_auto_says_what_it_does_not_know(name: str, content: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UsageError, match=said):
        list(read_task("auto", path))


def test_files_are_streamed(tmp_path: Path) -> None:
    path = tmp_path / "large.jsonl"
    line = json.dumps({"prompt": "a" * 1000, "response": "b" * 1000}) + "\n"
    path.write_text(line * 10_000, encoding="utf-8")
    tracemalloc.start()
    count = sum(1 for _ in read_task("auto", path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 10_000
    assert peak < 2_000_000, "20 MB were read"


def test_the_published_multirc_is_read_whole(data_dir: Path) -> None:
    examples = list(read_task("auto", data_dir / "multirc" / "val.jsonl"))
    # The sizes that SuperGLUE's own page and data card give for the validation set.
    assert len(examples) == 4848
    assert len({example.group for example in examples}) == 953
    assert all(isinstance(example, Example) and example.answer in (" No", " Yes") for example in examples)


def test_plain_text_files_are_text(data_dir: Path) -> None:
    path = data_dir / "text" / "shakespeare.txt"
    passages = list(read_task("auto", path))
    words = [word for passage in passages for word in passage.text.split()]
    assert words == path.read_text(encoding="utf-8").split()


PAGE = Path(__file__).resolve().parents[3] / "docs" / "training-data.md"
ROWS = re.findall(
    r"^\| (?:`(\w+)`)? ?\|(?: flat:)? `(\{.*?\})`(?: \(|\s*\|)", PAGE.read_text(encoding="utf-8"), re.MULTILINE
)


def test_the_page_shows_every_format() -> None:
    assert {task for task, _ in ROWS if task} == set(task_names()) - {"auto", "demo", "text"}


@pytest.mark.parametrize(("task", "line"), ROWS)
def test_the_lines_on_the_page_are_read(task: str, line: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(line, encoding="utf-8")
    assert recognise(path) == (task or recognise(path))
    assert list(read_task("auto", path))
