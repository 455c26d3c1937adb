"""Files of every format to examples; what does not parse names file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from split_llama.errors import UsageError
from training.tasks.examples import Dialogue, Example, Message, Passage, choices
from training.tasks.readers import PASSAGE_CHARACTERS, read_task, recognise, task_names

MULTIRC = {
    "idx": 4,
    "passage": {
        "text": "Mia is in the hall.",
        "questions": [
            {
                "question": "Where is Mia?",
                "idx": 7,
                "answers": [{"text": "In the hall", "idx": 0, "label": 1}, {"text": "", "idx": 1, "label": 0}],
            },
            {"question": "Who is there?", "idx": 8, "answers": [{"text": "Tom", "idx": 2, "label": 0}]},
        ],
    },
}
MULTIRC_FLAT = {
    "paragraph": "Mia is in the hall.",
    "question": "Where is Mia?",
    "answer": "In the hall",
    "idx": {"paragraph": 4, "question": 7, "answer": 0},
    "label": 1,
}
RECORD = {
    "idx": 0,
    "source": "news",
    "passage": {
        "text": "Mia met Tom.\n@highlight\nTom was late.",
        "entities": [{"start": 0, "end": 2}, {"start": 8, "end": 10}, {"start": 24, "end": 26}],
    },
    "qas": [{"idx": 0, "query": "@placeholder waited.", "answers": [{"start": 0, "end": 2, "text": "Mia"}]}],
}
RECORD_FLAT = {
    "passage": "Mia met Tom.\n@highlight\nTom was late.",
    "query": "@placeholder waited.",
    "entities": ["Mia", "Tom"],
    "answers": ["Mia"],
    "idx": {"passage": 0, "query": 0},
}
WSC: dict[str, Any] = {
    "text": "Mia saw Tom when she left.",
    "target": {"span1_index": 0, "span1_text": "Mia", "span2_index": 4, "span2_text": "she"},
    "idx": 0,
    "label": True,
}
WSC_FLAT = {"text": WSC["text"], "label": 1, "idx": 0} | WSC["target"]
COQA = {
    "id": "s1",
    "source": "wikipedia",
    "story": "Mia has a red hat.",
    "questions": [{"input_text": "Who?", "turn_id": 1}, {"input_text": "What colour?", "turn_id": 2}],
    "answers": [{"input_text": "Mia", "turn_id": 1}, {"input_text": "red", "turn_id": 2}],
    "additional_answers": {
        "0": [{"input_text": "mia", "turn_id": 1}, {"input_text": "It is red", "turn_id": 2}],
        "1": [{"input_text": "the girl", "turn_id": 1}, {"input_text": "Red.", "turn_id": 2}],
    },
}
COQA_FLAT = {
    "source": "wikipedia",
    "story": "Mia has a red hat.",
    "questions": ["Who?", "What colour?"],
    "answers": {"input_text": ["Mia", "red"], "answer_start": [0, 10], "answer_end": [3, 13]},
}
# One line of each format that `auto` must know, and the first example made of it.
LINES: dict[str, tuple[str, dict[str, Any], Example | Dialogue]] = {
    "pairs": ("pairs", {"prompt": "2 + 2 =", "response": " 4"}, Example("2 + 2 =", " 4")),
    "completion": ("pairs", {"prompt": "2 + 2 =", "completion": " 4"}, Example("2 + 2 =", " 4")),
    "chat": (
        "chat",
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]},
        Dialogue((Message("user", "Hi"), Message("assistant", "Hello!"))),
    ),
    "multirc": (
        "multirc",
        MULTIRC,
        Example(
            "Mia is in the hall.\nQuestion: Where is Mia?\nProposed answer: In the hall\n"
            "Is the proposed answer right?\nAnswer:",
            " Yes",
            (" No", " Yes"),
            group="4/7",
            label="yes",
        ),
    ),
    "boolq": (
        "boolq",
        {"question": "is mia in the hall", "passage": "Mia is there.", "idx": 0, "label": False},
        Example("Mia is there.\nQuestion: is mia in the hall?\nAnswer:", " No", (" No", " Yes"), label="no"),
    ),
    "cb": (
        "cb",
        {"premise": "Mia may come.", "hypothesis": "Mia comes.", "label": "neutral", "idx": 0},
        Example(
            "Mia may come.\nStatement: Mia comes.\nQuestion: Is the statement true, false, or neither?\nAnswer:",
            " Neither",
            (" True", " False", " Neither"),
            label="neutral",
        ),
    ),
    "rte": (
        "rte",
        {"premise": "Mia came.", "hypothesis": "Tom came.", "label": "not_entailment", "idx": 0},
        Example(
            "Mia came.\nQuestion: Does it follow that Tom came?\nAnswer:",
            " No",
            (" Yes", " No"),
            label="not_entailment",
        ),
    ),
    "copa": (
        "copa",
        {"premise": "It rained.", "choice1": "I got wet.", "choice2": "I ate.", "question": "effect", "label": 0},
        Example(
            "It rained.\nQuestion: What happened as a result?\nAnswer:",
            " I got wet.",
            (" I got wet.", " I ate."),
            label="0",
        ),
    ),
    "record": (
        "record",
        RECORD,
        Example(
            "Mia met Tom.\nTom was late.\nStatement: ____ waited.\n"
            "Question: Which name is missing at the blank?\nAnswer:",
            " Mia",
            (" Mia", " Tom"),
        ),
    ),
    "wic": (
        "wic",
        {"word": "bank", "sentence1": "A river bank.", "sentence2": "A savings bank.", "idx": 0, "label": False},
        Example(
            "A river bank.\nA savings bank.\n"
            "Question: Does the word bank have the same meaning in both sentences?\nAnswer:",
            " No",
            (" No", " Yes"),
            label="no",
        ),
    ),
    "wsc": (
        "wsc",
        WSC,
        Example(
            'Mia saw Tom when she left.\nQuestion: In this text, does "she" stand for Mia?\nAnswer:',
            " Yes",
            (" No", " Yes"),
            label="yes",
        ),
    ),
    "coqa": (
        "coqa",
        COQA,
        Example(
            "Mia has a red hat.\nQuestion: Who?\nAnswer:",
            " Mia",
            accepted=(" mia", " the girl"),
            group="s1",
            label="wikipedia",
        ),
    ),
    "xsum": (
        "xsum",
        {"document": "Mia went out. It rained.", "summary": "Mia got wet.", "id": "1"},
        Example("Mia went out. It rained.\nSummary:", " Mia got wet."),
    ),
}


def write_lines(path: Path, *objects: Any) -> Path:
    """Write one JSON value a line."""
    path.write_text("".join(json.dumps(item) + "\n" for item in objects), encoding="utf-8")
    return path


def without(fields: dict[str, Any], name: str) -> dict[str, Any]:
    """A copy that lacks this field."""
    return {key: value for key, value in fields.items() if key != name}


@pytest.mark.parametrize("name", LINES)
def test_every_format_is_recognised_and_read(name: str, tmp_path: Path) -> None:
    task, line, expected = LINES[name]
    path = write_lines(tmp_path / "data.jsonl", line, line)
    assert recognise(path) == task
    examples = list(read_task("auto", path))
    assert examples[0] == expected
    assert examples == list(read_task(task, path))
    assert len(examples) % 2 == 0
    if isinstance(expected, Example) and expected.choices:
        assert expected.answer in choices(examples[0])


@pytest.mark.parametrize(
    ("task", "nested", "flat"),
    [("multirc", MULTIRC, MULTIRC_FLAT), ("record", RECORD, RECORD_FLAT), ("wsc", WSC, WSC_FLAT)],
)
def test_flat_copies_give_the_same_examples(
    task: str, nested: dict[str, Any], flat: dict[str, Any], tmp_path: Path
) -> None:
    path = write_lines(tmp_path / "flat.jsonl", flat)
    assert recognise(path) == task
    whole = read_task(task, write_lines(tmp_path / "nested.jsonl", nested))
    assert next(read_task("auto", path)) == next(whole)


def test_the_published_label_numbers_are_understood(tmp_path: Path) -> None:
    cb = {"premise": "A.", "hypothesis": "B."}
    path = write_lines(tmp_path / "cb.jsonl", *({**cb, "label": label} for label in (0, 1, 2)))
    assert [example.label for example in read_task("cb", path)] == ["entailment", "contradiction", "neutral"]
    path = write_lines(tmp_path / "rte.jsonl", *({**cb, "label": label} for label in (0, 1)))
    assert [example.label for example in read_task("rte", path)] == ["entailment", "not_entailment"]


def test_pairs_and_chats_may_name_a_label(tmp_path: Path) -> None:
    for name in ("pairs", "chat"):
        path = write_lines(tmp_path / name, LINES[name][1] | {"label": "north"}, LINES[name][1] | {"label": 3})
        assert [example.label for example in read_task("auto", path)] == ["north", "3"]


def test_multirc_groups_the_options_of_a_question(tmp_path: Path) -> None:
    examples = list(read_task("multirc", write_lines(tmp_path / "m.jsonl", MULTIRC)))
    assert [example.group for example in examples] == ["4/7", "4/7", "4/8"]
    assert [example.answer for example in examples] == [" Yes", " No", " No"]


def test_coqa_shows_the_turns_before_in_all_its_layouts(tmp_path: Path) -> None:
    nested = list(read_task("coqa", write_lines(tmp_path / "a.jsonl", COQA)))
    flat = list(read_task("auto", write_lines(tmp_path / "b.jsonl", COQA_FLAT)))
    official = tmp_path / "coqa.json"
    official.write_text(json.dumps({"version": "1.0", "data": [COQA, COQA]}, indent=1), encoding="utf-8")
    assert nested[1].prompt == "Mia has a red hat.\nQuestion: Who?\nAnswer: Mia\nQuestion: What colour?\nAnswer:"
    assert [(e.prompt, e.answer) for e in flat] == [(e.prompt, e.answer) for e in nested]
    assert nested[1].accepted == (" It is red", " Red.")
    assert list(read_task("auto", official)) == nested * 2


def test_record_keeps_all_right_names(tmp_path: Path) -> None:
    line = {**RECORD_FLAT, "answers": ["Tom", "Mia", "Tom"]}
    (example,) = read_task("record", write_lines(tmp_path / "r.jsonl", line))
    assert (example.answer, example.accepted, example.choices) == (" Tom", (" Mia",), (" Mia", " Tom"))


def test_plain_text_comes_in_runs_of_whole_lines(tmp_path: Path) -> None:
    lines = [f"Line {number} of a story.\n" for number in range(500)]
    path = tmp_path / "story.txt"
    path.write_text("".join(lines), encoding="utf-8")
    passages = list(read_task("auto", path))
    assert all(isinstance(passage, Passage) for passage in passages)
    assert "".join(passage.text for passage in passages) == "".join(lines)
    assert all(PASSAGE_CHARACTERS <= len(p.text) < PASSAGE_CHARACTERS + 30 for p in passages[:-1])


@pytest.mark.parametrize(
    ("task", "line", "said"),
    [
        ("pairs", {"prompt": "a"}, "'response' is missing, a text was expected; fields: 'prompt'"),
        ("pairs", {"prompt": 3, "response": "b"}, "'prompt' must be a text, found 3"),
        ("pairs", {"prompt": "a", "response": " "}, "'response' must be a text that is not empty"),
        ("pairs", {"prompt": "a", "response": "\ud83d"}, "'response' must be valid text, without half a surrogate"),
        ("record", RECORD_FLAT | {"answers": ["\udc00"]}, "'answers[0]' must be valid text"),
        ("pairs", ["a", "b"], "a JSON object is expected, found ['a', 'b']"),
        ("chat", LINES["chat"][1] | {"label": None}, "'label' must be a number or a text, found None"),
        ("chat", {"messages": []}, "'messages' must be a list that is not empty"),
        ("chat", {"messages": ["hi"]}, "'messages[0]' must be an object, found 'hi'"),
        ("chat", {"messages": [{"role": "bot", "content": "a"}]}, "'messages[0].role' must be one of system, user"),
        ("chat", {"messages": [{"role": "user", "content": "a"}]}, "a list that ends with a turn of the assist"),
        ("multirc", {"idx": 0, "passage": {"text": "a"}}, "'questions' is missing in 'passage'"),
        ("multirc", without(MULTIRC_FLAT, "label"), "'label' is missing"),
        ("boolq", {"question": "a", "passage": "b", "label": -1}, "'label' must be 'false' or 'true' (or its number"),
        ("cb", {"premise": "a", "hypothesis": "b", "label": "maybe"}, "found 'maybe'"),
        ("rte", {"premise": "a", "hypothesis": "b", "label": True}, "entailment"),
        ("copa", LINES["copa"][1] | {"question": "why"}, "'question' must be 'cause' or 'effect', found 'why'"),
        ("wic", LINES["wic"][1] | {"label": 2}, "found 2"),
        ("wsc", WSC | {"target": {}}, "'span1_text' is missing in 'target', a text was expected; fields: none"),
        ("record", RECORD_FLAT | {"query": "no gap"}, "'query' must be a statement with '@placeholder' in it"),
        ("record", RECORD_FLAT | {"entities": [None]}, "'entities[0]' must be a text that is not empty, found None"),
        ("record", RECORD | {"passage": {"text": "Mia", "entities": [{"start": 0, "end": 3}]}}, "entities[0].end"),
        ("coqa", COQA_FLAT | {"questions": ["Who?"]}, "'answers' must be as many as there are questions, 1, found 2"),
        ("coqa", COQA | {"additional_answers": {"0": ["one"]}}, "'additional_answers.0' must be as many answers"),
        ("xsum", {"document": "a"}, "'summary' is missing"),
    ],
)
def test_a_malformed_line_names_file_and_line(task: str, line: Any, said: str, tmp_path: Path) -> None:
    good = LINES[task][1]
    path = write_lines(tmp_path / "data.jsonl", good, good, line, good)
    examples = read_task(task, path)
    before = len(list(read_task(task, write_lines(tmp_path / "good.jsonl", good))))
    for _ in range(2 * before):
        next(examples)
    with pytest.raises(UsageError) as refused:
        list(examples)
    assert str(refused.value).startswith(f"{path}, line 3: ")
    assert said in str(refused.value)


def test_wrong_names_and_paths_are_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", LINES["pairs"][1])
    with pytest.raises(UsageError, match="did you mean 'multirc'"):
        read_task("multrc", path)
    with pytest.raises(UsageError, match="takes no file"):
        read_task("demo", path)
    with pytest.raises(UsageError, match="needs a data file"):
        read_task("boolq")
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        list(read_task("boolq", tmp_path / "none.jsonl"))
    with pytest.raises(UsageError, match="cannot be read: Is a directory"):
        list(read_task("text", tmp_path))
    assert len(list(read_task("demo"))) == 2000
    assert len(list(read_task("demo", part="test"))) == 400
    assert {"auto", "demo", "text", "multirc", "pairs"} < set(task_names())
