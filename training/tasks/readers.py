"""Data files to examples: `read_task` knows every format by name, and `auto` by the file's first line.

Files are read line by line, so their size does not matter. What does not parse raises `UsageError` with the file, the
line, what was expected and what came.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from split_llama.errors import CheckpointError, UsageError
from split_llama.json_file import read_json
from split_llama.settings import closest
from training.tasks import superglue
from training.tasks.demo_task import Part, demo_examples
from training.tasks.examples import ROLES, AnyExample, Dialogue, Example, Message, Passage
from training.tasks.fields import Fields, json_lines, numbered_lines, parse_line
from training.tasks.templates import fill

PASSAGE_CHARACTERS = 2000
DEMO_COUNTS: Mapping[Part, int] = MappingProxyType({"train": 2000, "test": 400})

LineReader = Callable[[Fields], Iterator[AnyExample]]


def read_task(name: str, path: Path | None = None, part: Part = "train") -> Iterator[AnyExample]:
    """The examples of the file at `path`, one at a time, in the file's order.

    `name` is one of `task_names()`. "demo" is generated, not read: it takes no `path`, and `part` chooses its training
    or its held-out examples (2,000 and 400). Raises `UsageError`, also for a file without any example.
    """
    if name == "demo":
        if path is not None:
            raise UsageError(f"the task demo makes its own examples, so it takes no file; found {path}")
        return iter(demo_examples(part, DEMO_COUNTS[part]))
    if name not in task_names():
        raise UsageError(f"there is no task {name!r}{closest(name, task_names())}; tasks: {', '.join(task_names())}")
    if path is None:
        raise UsageError(f"the task {name} needs a data file")
    return _not_empty(_read(recognise(path) if name == "auto" else name, path), path)


def task_names() -> tuple[str, ...]:
    """All names that `read_task` knows."""
    return ("auto", "demo", "text", *_LINE_READERS)


def recognise(path: Path) -> str:
    """The task whose format the first line of `path` has. Raises `UsageError` when it has none, or that of several."""
    if path.suffix == ".json":
        return "coqa"
    number, line = next(numbered_lines(path), (0, ""))
    if not number:
        raise _nothing(path)
    if not line.lstrip().startswith("{"):
        if path.suffix in (".jsonl", ".ndjson"):
            raise UsageError(f"{path}, line {number}: a JSON object is expected, found {line.strip()!r:.80}")
        return "text"
    return _by_fields(parse_line(line, f"{path}, line {number}"))


def _by_fields(line: Fields) -> str:
    if line.has("premise", "hypothesis"):
        return _cb_or_rte(line)
    for task, fields in _SIGNS:
        if line.has(*fields):
            return task
    there = ", ".join(map(repr, list(line.raw)[:12])) or "none"
    raise UsageError(
        f"{line.where}: no task has lines with these fields: {there:.200}; "
        f"name the task, one of {', '.join(_LINE_READERS)}"
    )


def _cb_or_rte(line: Fields) -> str:
    label = line.raw.get("label")
    if label in ("contradiction", "neutral"):
        return "cb"
    if label == "not_entailment":
        return "rte"
    raise UsageError(f"{line.where}: this may be the format of cb or of rte, which look alike: name the task")


def _read(name: str, path: Path) -> Iterator[AnyExample]:
    if name == "text":
        return _passages(path)
    if name == "coqa" and path.suffix == ".json":
        return (example for story in _coqa_stories(path) for example in _coqa(story))
    reader = _LINE_READERS[name]
    return (example for line in json_lines(path) for example in reader(line))


def _not_empty(examples: Iterator[AnyExample], path: Path) -> Iterator[AnyExample]:
    none = True
    for example in examples:
        none = False
        yield example
    if none:
        raise _nothing(path)


def _nothing(path: Path) -> UsageError:
    return UsageError(f"{path} holds no examples: it is empty")


def _pairs(line: Fields) -> Iterator[Example]:
    answer = "completion" if line.has("completion") and not line.has("response") else "response"
    yield Example(line.text("prompt"), line.text(answer), label=_label(line))


def _chats(line: Fields) -> Iterator[Dialogue]:
    messages = []
    for turn in line.children("messages"):
        role = turn.text("role")
        if role not in ROLES:
            raise turn.refusal("role", f"one of {', '.join(ROLES)}", role)
        messages.append(Message(role, turn.text("content")))
    if messages[-1].role != "assistant":
        raise line.refusal(
            "messages", "a list that ends with a turn of the assistant", f"a last turn of {messages[-1].role}"
        )
    yield Dialogue(tuple(messages), _label(line))


def _label(line: Fields) -> str:
    """The class by which this line may be dealt out non-iid, where it names one."""
    return line.identity("label") if line.has("label") else ""


def _xsum(line: Fields) -> Iterator[Example]:
    yield Example(fill("xsum", document=line.text("document")), f" {line.text('summary').strip()}")


def _coqa(story: Fields) -> Iterator[Example]:
    """One story with its questions: the official nesting, or the flat lists of the Hugging Face copy."""
    questions = _texts_of(story, "questions")
    answers = _texts_of(story, "answers")
    if len(questions) != len(answers):
        raise story.refusal("answers", f"as many as there are questions, {len(questions)}", len(answers))
    others = _further_answers(story, len(answers))
    turns, name = "", str(story.raw.get("id", story.where))
    for number, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        prompt = fill("coqa", story=story.text("story").strip(), turns=turns, question=question)
        accepted = tuple(f" {texts[number]}" for texts in others)
        yield Example(prompt, f" {answer}", accepted=accepted, group=name, label=str(story.raw.get("source", "")))
        turns += fill("coqa-turn", question=question, answer=answer)


def _further_answers(story: Fields, count: int) -> list[list[str]]:
    """The answers of other people, one list of `count` for each; only the official validation set has them."""
    if not story.has("additional_answers"):
        return []
    people = story.child("additional_answers")
    lists = [_texts_of(people, name) for name in people.raw]
    for name, texts in zip(people.raw, lists, strict=True):
        if len(texts) != count:
            raise people.refusal(name, f"as many answers as there are questions, {count}", len(texts))
    return lists


def _texts_of(fields: Fields, name: str) -> list[str]:
    value = fields.raw.get(name)
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [turn.text("input_text").strip() for turn in fields.children(name)]
    listed = fields.child(name).texts("input_text") if isinstance(value, dict) else fields.texts(name)
    return [text.strip() for text in listed]


def _coqa_stories(path: Path) -> Iterator[Fields]:
    """The stories of the official file, which is one JSON object; errors count stories, as it has no lines."""
    try:
        whole: dict[str, Any] = read_json(path)
    except CheckpointError as error:
        raise UsageError(f"{error}; CoQA's file is one object with a list 'data'") from None
    for number, story in enumerate(Fields(whole, str(path)).children("data"), start=1):
        yield Fields(story.raw, f"{path}, story {number}")


def _passages(path: Path) -> Iterator[Passage]:
    """Runs of whole lines of at least `PASSAGE_CHARACTERS` characters: the encoder cuts them further if need be."""
    text = ""
    for _, line in numbered_lines(path):
        text += line
        if len(text) >= PASSAGE_CHARACTERS:
            yield Passage(text)
            text = ""
    if text.strip():
        yield Passage(text)


_LINE_READERS: Mapping[str, LineReader] = MappingProxyType(
    {
        "pairs": _pairs,
        "chat": _chats,
        "multirc": superglue.multirc,
        "boolq": superglue.boolq,
        "cb": superglue.cb,
        "copa": superglue.copa,
        "record": superglue.record,
        "rte": superglue.rte,
        "wic": superglue.wic,
        "wsc": superglue.wsc,
        "coqa": _coqa,
        "xsum": _xsum,
    }
)
# Fields that only lines of this task have; the first match counts.
_SIGNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("chat", ("messages",)),
    ("pairs", ("prompt", "response")),
    ("pairs", ("prompt", "completion")),
    ("multirc", ("paragraph", "question", "answer")),
    ("record", ("qas",)),
    ("record", ("query", "entities")),
    ("copa", ("choice1", "choice2")),
    ("wic", ("word", "sentence1")),
    ("wsc", ("target",)),
    ("wsc", ("span1_text", "span2_text")),
    ("coqa", ("story", "questions")),
    ("xsum", ("document", "summary")),
    ("boolq", ("passage", "question")),
    ("multirc", ("passage",)),
)
