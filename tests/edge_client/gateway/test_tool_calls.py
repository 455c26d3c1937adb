"""Tool calls as text: grammars of llguidance, the reader, and what the models' own tokenizers make of it."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_client.constraint import Constraint
from edge_client.gateway.errors import ApiError
from edge_client.gateway.grammar import GrammarConstraint, Grammars, Trigger, TriggeredConstraint
from edge_client.gateway.tool_calls import (
    HERMES,
    LLAMA,
    CallPiece,
    CallReader,
    Choice,
    ToolFormat,
    format_of,
    grammar,
    grammar_behind_trigger,
    write_call,
)
from edge_client.gateway.vocabulary import Vocabulary
from edge_client.tokenizer import EdgeTokenizer
from split_llama.demo import demo_model_path
from split_llama.errors import UsageError
from tests.conftest import TinyCheckpoint

INTEGER = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
TEXT = {"type": "object", "properties": {"b": {"type": "string"}}, "required": ["b"], "additionalProperties": False}
SCHEMAS: dict[str, dict[str, Any]] = {"get": INTEGER, "put": TEXT}
ONE, OTHER = {"a": 1}, {"b": 'x}"{</tool_call>'}


class Follower:
    """Feeds texts to a grammar, token by token, through the mask."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = EdgeTokenizer.open(folder)
        vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
        self.grammars = Grammars(folder, vocab_size, [2])
        self.vocab_size = vocab_size
        self.vocabulary = Vocabulary.open(folder)

    def constraint(self, form: ToolFormat, choice: Choice, answer: dict[str, Any] | None = None) -> Constraint:
        """As `chat_plan` makes it."""
        tokens = self.vocabulary.added
        if choice.must or answer is not None:
            return self.grammars.lark(grammar(form, SCHEMAS, choice, answer, tokens), "tools")()
        make = self.grammars.lark(grammar_behind_trigger(form, SCHEMAS, choice, tokens), "tools")
        trigger = Trigger(form.trigger.encode(), many=form.many, again=form.many and choice.parallel)
        return TriggeredConstraint(trigger, make, self.vocabulary.bytes_of)

    def takes(self, constraint: Constraint, text: str) -> tuple[bool, bool, bool]:
        """Give (all of it, may end there, must end there)."""
        for token in self.tokenizer.encode(text, special_tokens=False):
            if constraint.finished or constraint.mask(torch.zeros(self.vocab_size))[token] != 0:
                return False, False, False
            constraint.take(token)
        must = constraint.finished
        may = must or bool(constraint.mask(torch.zeros(self.vocab_size))[2] == 0)
        return True, may, must


@pytest.fixture
def follower(tiny_checkpoint: TinyCheckpoint) -> Follower:
    return Follower(tiny_checkpoint())


def answers(form: ToolFormat) -> dict[str, str]:
    one, other = write_call("get", ONE, form), write_call("put", OTHER, form)
    return {
        "nothing": "",
        "text": "Hello <tool {x}",
        "json": '{"x": 1}',
        "call": one,
        "two calls": f"{one}\n{other}",
        "text and call": f"Well. {other}",
        "unknown": write_call("rm", {}, form),
        "wrong arguments": write_call("get", {"a": "1"}, form),
    }


HERMES_AUTO = {"nothing", "text", "json", "call", "two calls", "text and call"}
ANSWER = {"type": "object", "properties": {"x": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("form", "must", "parallel", "schema", "allowed"),
    [
        (HERMES, False, True, None, HERMES_AUTO),
        (HERMES, False, False, None, HERMES_AUTO - {"two calls"}),
        (HERMES, False, True, ANSWER, {"json", "call", "two calls"}),
        (HERMES, True, True, None, {"call", "two calls"}),
        (HERMES, True, False, None, {"call"}),
        (LLAMA, False, True, None, {"nothing", "text", "json", "call", "text and call"}),
        (LLAMA, True, True, None, {"call"}),
    ],
)
def test_grammars_allow_what_the_choice_says(
    follower: Follower, form: ToolFormat, must: bool, parallel: bool, schema: dict[str, Any] | None, allowed: set[str]
) -> None:
    for name, text in answers(form).items():
        constraint = follower.constraint(form, Choice(("get", "put"), must, parallel), schema)
        taken, may_end, _ = follower.takes(constraint, text)
        # "text and call" is plain text to a format whose call is the whole answer.
        assert (taken and may_end) == (name in allowed), name


def test_a_single_call_ends_the_answer_without_a_token_more(follower: Follower) -> None:
    for must in (True, False):
        constraint = follower.constraint(HERMES, Choice(("get",), must, False))
        assert follower.takes(constraint, write_call("get", ONE)) == (True, True, True)


@pytest.mark.parametrize("name", ["demo", "llama2-tokenizer", "stories260K"])
def test_other_tokenizers(name: str, data_dir: Path) -> None:
    """Byte-level and SentencePiece: the same texts pass."""
    follower = Follower(demo_model_path() if name == "demo" else data_dir / name)
    # A leading space belongs to a SentencePiece tokenizer's first word, not to the answer.
    prefix = follower.tokenizer.encode("x", special_tokens=False)
    tokens = follower.tokenizer.encode("x" + write_call("put", {"b": "höchst 🙂"}), special_tokens=False)[len(prefix) :]
    for must in (True, False):
        constraint = follower.constraint(HERMES, Choice(("put",), must, True))
        held = []
        for token in tokens:
            mask = constraint.mask(torch.zeros(follower.vocab_size))
            held.append(bool(mask.isinf().any()))
            assert mask[token] == 0
            constraint.take(token)
        assert constraint.mask(torch.zeros(follower.vocab_size))[2] == 0
        assert held[-10:] == [True] * 10
        assert held[0] == must


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "nope"}, "nope"),
        ({"$ref": "http://127.0.0.1:9/x"}, "127.0.0.1"),
        ({"type": "string", "pattern": "(?=a)"}, "look-around"),
        ({"type": "object", "not": {}}, "not"),
        ({"anyOf": "x"}, ""),
        ({"type": "string", "const": "\ud800"}, ""),
    ],
)
def test_a_schema_that_cannot_be_compiled_names_its_field(
    follower: Follower, schema: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ApiError, match=f"response_format cannot be compiled: .*{reason}") as caught:
        follower.grammars.json(schema, "response_format")
    assert caught.value.param == "response_format"


def test_json_has_one_way_of_writing(follower: Follower) -> None:
    """A model that may choose its blanks fills the answer with them."""
    make = follower.grammars.json({"type": "object", "x-guidance": {"whitespace_flexible": True}}, "x")
    assert follower.takes(make(), '{"a": [1, 2]}')[0]
    assert not follower.takes(make(), '{"a":  [1]}')[0]


def read(form: ToolFormat, text: str, cuts: list[int]) -> list[str | tuple[str, str]]:
    """Read `text` in pieces that end at `cuts`; give plain text and (name, arguments), joined."""
    reader = CallReader(form, ["get", "put"])
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    pieces = [part for begin, end in pairwise(places) for part in reader.push(text[begin:end])]
    found: list[str | tuple[str, str]] = []
    for piece in [*pieces, *reader.flush()]:
        last = found[-1] if found else None
        if isinstance(piece, CallPiece):
            if piece.name is not None:
                found.append((piece.name, piece.arguments))
            else:
                assert isinstance(last, tuple)
                found[-1] = (last[0], last[1] + piece.arguments)
        elif isinstance(last, str):
            found[-1] = last + piece
        else:
            found.append(piece)
    return found


@settings(max_examples=200, deadline=None)
@given(cuts=st.lists(st.integers(0, 500), max_size=30))
def test_the_reader_finds_the_same_whatever_the_pieces(cuts: list[int]) -> None:
    text = f"Well <tool_cal \n{write_call('get', ONE)}\n{write_call('put', OTHER)}\n"
    assert read(HERMES, text, cuts) == ["Well <tool_cal", ("get", json.dumps(ONE)), ("put", json.dumps(OTHER))]
    assert read(HERMES, "a <tool_call> b  ", cuts) == ["a <tool_call> b  "]
    assert read(LLAMA, write_call("put", OTHER, LLAMA), cuts) == [("put", json.dumps(OTHER))]
    assert read(LLAMA, "No. " + write_call("put", OTHER, LLAMA), cuts) == ["No. " + write_call("put", OTHER, LLAMA)]
    assert read(LLAMA, '{"names": "rm"}', cuts) == ['{"names": "rm"}']


def test_a_call_that_is_cut_is_known_as_such() -> None:
    reader = CallReader(HERMES, ["get"])
    for part in (write_call("get", ONE)[:-20], "}"):
        reader.push(part)
    assert reader.is_inside
    opening = CallReader(HERMES, ["get"])
    assert opening.push(f"Well.\n{write_call('get', ONE)[:18]}") + opening.flush() == ["Well."]
    whole = CallReader(HERMES, ["get"])
    whole.push(write_call("get", ONE))
    assert not whole.is_inside
    assert whole.calls == 1


@pytest.mark.parametrize(
    ("template", "form"),
    [
        ("{{ messages }}", None),
        ("{% if tools %}<tool_call>{% endif %}", HERMES),
        ('{% if tools %}{"name": function name, "parameters": dictionary}{% endif %}', LLAMA),
        ("{% if tools %}[AVAILABLE_TOOLS]{% endif %}", None),
    ],
)
def test_the_format_is_the_templates(template: str, form: ToolFormat | None) -> None:
    assert format_of(template) is form


@pytest.mark.parametrize(
    ("reason", "said"),
    [("", "does not say why"), (" \n", "does not say why"), ("no such token\nat lib.rs:3", "no such token$")],
)
def test_what_cannot_be_followed_says_why_if_anything_is_known(reason: str, said: str) -> None:
    class Matcher:
        def compute_bitmask(self) -> bytes:
            return b"\xff"

        def is_error(self) -> bool:
            return True

        def consume_token(self, token: int) -> bool:
            return False

        def get_error(self) -> str:
            return reason

    constraint = GrammarConstraint(Matcher(), None)
    with pytest.raises(UsageError, match=f"cannot be followed: .*{said}"):
        constraint.mask(torch.zeros(8))
    with pytest.raises(UsageError, match=f"cannot be followed: .*{said}"):
        constraint.take(3)
