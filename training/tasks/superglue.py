"""The SuperGLUE data sets, each from its original JSON lines and from the flat lines of the Hugging Face copies.

Every reader takes one line and gives its examples. Answers are choices; labels are the answers' classes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from training.tasks.examples import Example
from training.tasks.fields import Fields
from training.tasks.templates import BLANK, CB_ANSWERS, NO_YES, RTE_ANSWERS, fill


def boolq(line: Fields) -> Iterator[Example]:
    """`{"question": ..., "passage": ..., "label": true}`."""
    prompt = fill("boolq", passage=line.text("passage"), question=line.text("question").rstrip().rstrip("?"))
    yield _verdict(prompt, line.label("false", "true"))


def cb(line: Fields) -> Iterator[Example]:
    """`{"premise": ..., "hypothesis": ..., "label": "neutral"}`."""
    yield _entailment("cb", line, CB_ANSWERS)


def rte(line: Fields) -> Iterator[Example]:
    """`{"premise": ..., "hypothesis": ..., "label": "not_entailment"}`."""
    yield _entailment("rte", line, RTE_ANSWERS)


def copa(line: Fields) -> Iterator[Example]:
    """`{"premise": ..., "choice1": ..., "choice2": ..., "question": "cause", "label": 0}`; label 0 is `choice1`."""
    asked = line.text("question")
    if asked not in ("cause", "effect"):
        raise line.refusal("question", "'cause' or 'effect'", asked)
    options = tuple(f" {line.text(name).strip()}" for name in ("choice1", "choice2"))
    right = line.label("0", "1")
    yield Example(fill(f"copa-{asked}", premise=line.text("premise")), options[right], options, label=str(right))


def multirc(line: Fields) -> Iterator[Example]:
    """A passage with its questions and their answers, or flat: one answer with `paragraph` and `question`.

    `{"passage": {"text": ..., "questions": [{"question": ..., "answers": [{"text": ..., "label": 1}], "idx": 0}]}}`
    """
    if line.has("paragraph"):
        index = line.child("idx")
        group = f"{index.identity('paragraph')}/{index.identity('question')}"
        yield _multirc_option(line.text("paragraph"), line.text("question"), line, "answer", group)
        return
    passage = line.child("passage")
    text, number = passage.text("text"), line.identity("idx")
    for question in passage.children("questions"):
        for option in question.children("answers"):
            group = f"{number}/{question.identity('idx')}"
            yield _multirc_option(text, question.text("question"), option, "text", group)


def _multirc_option(paragraph: str, question: str, option: Fields, name: str, group: str) -> Example:
    # The published data has an empty option.
    prompt = fill("multirc", paragraph=paragraph, question=question, answer=option.any_text(name))
    return _verdict(prompt, option.label("false", "true"), group)


def record(line: Fields) -> Iterator[Example]:
    """A passage with marked entities and statements that lack one, or flat: one `query` with its `entities`.

    `{"passage": {"text": ..., "entities": [{"start": 0, "end": 4}]}, "qas": [{"query": "@placeholder ...", "answers":
    [{"text": ...}]}]}`; `end` is the last character, not the one behind it.
    """
    if line.has("query"):
        yield _record_query(line, line.text("passage"), line.texts("entities"), line.texts("answers"))
        return
    passage = line.child("passage")
    text = passage.text("text")
    entities = [_span(text, entity) for entity in passage.children("entities")]
    for query in line.children("qas"):
        yield _record_query(query, text, entities, [answer.text("text") for answer in query.children("answers")])


def _span(text: str, entity: Fields) -> str:
    start, end = entity.whole("start"), entity.whole("end")
    if not start <= end < len(text):
        raise entity.refusal("end", f"between start and the passage's last character, {len(text) - 1}", end)
    return text[start : end + 1]


def _record_query(query: Fields, passage: str, entities: list[str], answers: list[str]) -> Example:
    statement = query.text("query")
    if "@placeholder" not in statement:
        raise query.refusal("query", "a statement with '@placeholder' in it", statement)
    # Highlights stand behind the passage as "@highlight" paragraphs.
    clean = re.sub(r"\s*@highlight\s*", "\n", passage)
    right = [f" {answer.strip()}" for answer in dict.fromkeys(answers)]
    options = tuple(dict.fromkeys([*(f" {entity.strip()}" for entity in entities), *right]))
    prompt = fill("record", passage=clean, query=statement.replace("@placeholder", BLANK))
    return Example(prompt, right[0], options, tuple(right[1:]))


def wic(line: Fields) -> Iterator[Example]:
    """`{"word": ..., "sentence1": ..., "sentence2": ..., "label": false}`."""
    prompt = fill("wic", **{name: line.text(name) for name in ("sentence1", "sentence2", "word")})
    yield _verdict(prompt, line.label("false", "true"))


def wsc(line: Fields) -> Iterator[Example]:
    """`{"text": ..., "target": {"span1_text": ..., "span2_text": ...}, "label": true}`, or both spans at the top."""
    target = line.child("target") if line.has("target") else line
    name, pronoun = target.text("span1_text"), target.text("span2_text")
    prompt = fill("wsc", text=line.text("text"), pronoun=f'"{pronoun.strip()}"', name=name)
    yield _verdict(prompt, line.label("false", "true"))


def _verdict(prompt: str, truth: int, group: str = "") -> Example:
    return Example(prompt, NO_YES[truth], NO_YES, group=group, label=NO_YES[truth].strip().lower())


def _entailment(task: str, line: Fields, answers: dict[str, str]) -> Example:
    names = tuple(answers)
    name = names[line.label(*names)]
    hypothesis = line.text("hypothesis").strip()
    prompt = fill(
        task, premise=line.text("premise"), hypothesis=hypothesis.rstrip(".") if task == "rte" else hypothesis
    )
    return Example(prompt, answers[name], tuple(answers.values()), label=name)
