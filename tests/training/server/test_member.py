"""What a client is told is cut up while it is sent, and only so much of it waits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from split_llama.errors import SlowReader
from split_llama.wire.codec import Codec
from split_llama.wire.frame import Frame, Kind
from split_llama.wire.training import Answer, Joined, Outcome
from training.server import member as members
from training.server.member import UNREAD_WINDOWS, Member

WIDTH = 8
ROWS = bytes(WIDTH * 4 * 100)


@pytest.fixture
def sent() -> list[Any]:
    return []


@pytest.fixture
def member(sent: list[Frame | Iterator[Frame]], monkeypatch: pytest.MonkeyPatch) -> Member:
    monkeypatch.setattr(members, "UNREAD_BYTES", 2 * len(ROWS))
    lobby: Any = None
    return Member(lobby, sent.append, lambda *_: None, lambda _: True, width=WIDTH, max_rows=100, max_frame_bytes=1000)


def tell(member: Member, step: int) -> None:
    member.send(Kind.REPLY, step, Outcome(generation=1, step=step, included=True), Codec.FP32, ROWS)


def test_answers_are_cut_when_they_are_asked_for(member: Member, sent: list[Any]) -> None:
    member.welcome(Joined(index=0, max_micros=2, max_rows=100))
    del sent[0]
    for micro in range(8):
        member.send(Kind.FORWARD, micro, Answer(generation=1, step=1, micro=micro), Codec.FP32, ROWS)
    assert member.nbytes == 8 * len(ROWS)
    frames = list(sent[0])
    assert sum(frame.count for frame in frames) == 100
    assert len(frames) > 3
    assert member.nbytes == 7 * len(ROWS)
    assert all(len(list(each)) == len(frames) for each in sent[1:])
    assert member.nbytes == 0


def test_a_client_too_far_behind_loses_its_connection(member: Member, sent: list[Any]) -> None:
    for step in range(1, 10):
        tell(member, step)
    assert member.nbytes == 3 * len(ROWS)
    assert not member.gone, "the lobby hears of it when the connection is gone"
    *letters, last = sent
    assert len(letters) == 3
    for letter in letters:
        assert list(letter)
    with pytest.raises(SlowReader, match="wait unread"):
        next(last)


def test_answers_that_nobody_reads_do_not_pile_up(member: Member, sent: list[Any]) -> None:
    member.welcome(Joined(index=0, max_micros=3, max_rows=100))
    del sent[0]
    for micro in range(30):
        member.send(Kind.BACKWARD, micro, Answer(generation=1, step=1, micro=micro), Codec.FP32, ROWS)
    assert len(sent) == UNREAD_WINDOWS * 3 + 1
    with pytest.raises(SlowReader, match="wait unread"):
        next(sent[-1])


def test_a_client_that_reads_hears_everything(member: Member, sent: list[Any]) -> None:
    for step in range(1, 10):
        tell(member, step)
        assert list(sent.pop())
    # Without rows it is no matter of memory.
    for step in range(1, 10):
        member.send(Kind.REPLY, step, Outcome(generation=1, step=step, included=True))
    assert len(sent) == 9
    assert all(len(list(letter)) == 1 for letter in sent)
