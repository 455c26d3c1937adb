"""The edge's protocol state against a fake server: whatever happens, rows arrive once and each answer is used once."""

from __future__ import annotations

import struct
from collections import deque

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from edge_client.session_events import Answer, Closed, Failed, Redirected, Retry
from edge_client.session_state import Phase, SessionState
from edge_client.step_log import EncodedRows, StepLog
from split_llama.errors import (
    BadStates,
    Draining,
    FlLlamaError,
    NotOwner,
    OutOfPages,
    RemoteError,
    SequenceGap,
    UnknownSession,
    WindowExceeded,
)
from split_llama.wire.codec import Codec
from split_llama.wire.control import Grant, Moved, Open, error_frame
from split_llama.wire.frame import Flag, Frame, Kind
from tests.edge_client.fake_server import FakeServer

WIDTH = 4
OPENING = Open(session="0" * 32, secret="1" * 64, blocks=(1, 3))


def rows_of(codec: Codec, values: list[int]) -> EncodedRows:
    """Rows whose bytes tell which they are."""
    pattern = {Codec.FP16: "<4e", Codec.FP32: "<4f"}[codec]
    return EncodedRows(codec, len(values), b"".join(struct.pack(pattern, value, 0, 0, 1) for value in values))


def split_rows(rows: EncodedRows) -> list[bytes]:
    size = len(rows.data) // rows.count
    return [rows.data[start : start + size] for start in range(0, len(rows.data), size)]


def live_session(window_steps: int = 10) -> SessionState:
    state = SessionState(OPENING, WIDTH)
    state.attach(1, 65536, 100)
    assert [frame.kind for frame in state.take_frames()] == [Kind.OPEN]
    grant = Grant(window_steps=window_steps, window_bytes=10000, length=0, seq=0, grace_seconds=1)
    assert state.on_frame(Frame(Kind.OPEN, handle=1, payload=grant.to_bytes())) == []
    return state


class Protocol(RuleBasedStateMachine):
    """Client and server with a link between them that loses everything when it breaks."""

    def __init__(self) -> None:
        super().__init__()
        self.server = FakeServer(WIDTH)
        self.state = SessionState(OPENING, WIDTH)
        self.up: deque[Frame] = deque()
        self.down: deque[Frame] = deque()
        self.connected = False
        self.expected: list[bytes] = []
        self.submitted: dict[int, list[bytes]] = {}
        self.answered: list[int] = []
        self.counter = 0
        self.drafted: tuple[int, list[bytes], tuple[int, ...]] | None = None

    def flush(self) -> None:
        if self.connected:
            self.up.extend(self.state.take_frames())

    @rule(count=st.integers(1, 5), back=st.integers(0, 2), codec=st.sampled_from([Codec.FP16, Codec.FP32]))
    def submit(self, count: int, back: int, codec: Codec) -> None:
        if self.state.unanswered > 6 or self.drafted is not None:
            return
        first = max(0, len(self.expected) - back)
        values = list(range(self.counter, self.counter + count))
        self.counter += count
        rows = rows_of(codec, values)
        pieces = split_rows(rows)
        self.expected[first:] = pieces
        flags, wanted = [(0, pieces), (Flag.REPLY_LAST, pieces[-1:]), (Flag.REPLY_NONE, [])][self.counter % 3]
        self.submitted[self.state.submit(first, rows, flags)] = wanted
        self.flush()

    @rule(parents=st.lists(st.integers(0, 3), max_size=3))
    def submit_draft(self, parents: list[int]) -> None:
        if self.state.unanswered or self.drafted is not None:
            return
        tree = [1]
        for node, parent in enumerate(parents, 1):
            tree.append(tree[min(parent, node - 1)] | 1 << node)
        values = list(range(self.counter, self.counter + len(tree)))
        self.counter += len(tree)
        rows = rows_of(Codec.FP16, values)
        token = self.state.submit_draft(len(self.expected), rows, tuple(tree))
        self.submitted[token] = split_rows(rows)
        self.drafted = (token, split_rows(rows), tuple(tree))
        self.flush()

    @rule(leaf=st.integers(0, 3))
    def settle(self, leaf: int) -> None:
        """Decide about an answered draft; nothing is sent before the next step."""
        if self.drafted is None or self.drafted[0] in self.submitted:
            return
        _, pieces, tree = self.drafted
        bits = tree[min(leaf, len(tree) - 1)]
        path = tuple(node for node in range(len(tree)) if bits >> node & 1)
        self.state.settle(path)
        self.expected += [pieces[node] for node in path]
        self.drafted = None

    @rule(back=st.integers(0, 3))
    def fork(self, back: int) -> None:
        """Go on in a fork; the parent is closed."""
        if self.state.unanswered or self.drafted is not None or not self.connected:
            return
        at = max(0, len(self.expected) - back)
        self.counter += 1
        parent, opening = self.state, OPENING.model_copy(update={"session": f"{self.counter:032x}"})
        self.state = parent.fork(opening, at)
        self.expected = self.expected[:at]
        self.state.attach(10 + self.counter, 120, 3)
        self.up.extend(parent.take_frames())
        self.flush()
        parent.close()
        self.up.extend(parent.take_frames())

    @rule()
    def server_reads(self) -> None:
        if self.up:
            self.down.extend(self.server.on_frame(self.up.popleft()))

    @rule()
    def client_reads(self) -> None:
        if self.down:
            frame = self.down.popleft()
            if frame.handle != self.state.handle:
                return  # a fork's parent, closed since
            for event in self.state.on_frame(frame):
                assert not isinstance(event, Failed | Closed), event
                if isinstance(event, Answer):
                    got = split_rows(event.rows) if event.rows is not None else []
                    assert got == self.submitted.pop(event.token)
                    self.answered.append(event.token)
            self.flush()

    @precondition(lambda self: self.connected)
    @rule(restart=st.booleans())
    def break_link(self, restart: bool) -> None:
        self.connected = False
        self.up.clear()
        self.down.clear()
        if restart:
            self.server.restart()
        self.server.disconnect()
        self.state.detach()

    @precondition(lambda self: not self.connected)
    @rule(handle=st.integers(1, 5))
    def connect(self, handle: int) -> None:
        self.connected = True
        self.state.attach(handle, 120, 3)
        self.flush()

    @rule(keep=st.integers(0, 4), unasked=st.booleans())
    def evict(self, keep: int, unasked: bool) -> None:
        frames = self.server.evict(keep)
        if unasked:
            self.down.extend(frames)
        else:
            for session in self.server.sessions.values():
                session.waiting = False

    @rule(error=st.sampled_from([OutOfPages("full"), Draining("bye", retry_after_ms=5)]))
    def refuse(self, error: FlLlamaError) -> None:
        self.server.refuse_next = error

    @rule()
    def refuse_open(self) -> None:
        self.server.refuse_open = True

    @rule()
    def timer(self) -> None:
        self.state.retry()
        self.flush()

    @invariant()
    def answers_in_order(self) -> None:
        assert self.answered == sorted(set(self.answered))

    def teardown(self) -> None:
        self.server.refuse_next, self.server.refuse_open = None, False
        if not self.connected:
            self.connect(9)
        for _ in range(1000):
            if not (self.up or self.down) and self.state.phase is Phase.LIVE and not self.state.unanswered:
                break
            self.server_reads()
            self.client_reads()
            self.timer()
        assert not self.submitted, "some steps were never answered"
        self.settle(3)
        session = self.server.sessions.get(self.state.opening.session)
        # A step tells the server what was settled; it is lost with the server unless a step came since.
        if session is not None and self.expected:
            self.submit(1, 0, Codec.FP16)
            for _ in range(100):
                self.server_reads()
                self.client_reads()
                self.timer()
            assert not self.submitted
            # Whatever nobody noticed before was mended by this step.
            session = self.server.sessions[self.state.opening.session]
            assert session.rows == self.expected


Protocol.TestCase.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
TestProtocol = Protocol.TestCase


def test_eager_steps_follow_open_and_the_window_holds_the_rest() -> None:
    state = SessionState(OPENING, WIDTH)
    for position in range(6):
        state.submit(position, rows_of(Codec.FP16, [position]))
    assert state.take_frames() == []
    state.attach(7, 65536, 100)
    frames = state.take_frames()
    assert [frame.kind for frame in frames] == [Kind.OPEN] + [Kind.STEP] * 4
    assert {frame.handle for frame in frames} == {7}
    assert [frame.seq for frame in frames[1:]] == [1, 2, 3, 4]
    grant = Grant(window_steps=5, window_bytes=10000, length=0, seq=0, grace_seconds=1)
    state.on_frame(Frame(Kind.OPEN, handle=7, payload=grant.to_bytes()))
    assert [frame.seq for frame in state.take_frames()] == [5]


def test_acknowledges_with_the_next_step() -> None:
    state = live_session()
    rows = rows_of(Codec.FP16, [0])
    token = state.submit(0, rows)
    (step,) = state.take_frames()
    assert step.ack == 0
    assert state.on_frame(Frame(Kind.REPLY, Codec.FP16, handle=1, seq=1, count=1, payload=rows.data)) == [
        Answer(token, 1, rows)
    ]
    state.submit(1, rows)
    assert state.take_frames()[0].ack == 1


def test_a_one_token_step_has_32_bytes_over_its_rows() -> None:
    state = live_session()
    state.submit(0, rows_of(Codec.FP16, [0]))
    (step,) = state.take_frames()
    assert len(step.encode()) == 32 + 2 * WIDTH


def test_refused_step_keeps_its_number() -> None:
    state = live_session()
    for position in range(3):
        state.submit(position, rows_of(Codec.FP16, [position]))
    assert len(state.take_frames()) == 3
    (event,) = state.on_frame(error_frame(1, 1, OutOfPages("full", retry_after_ms=70)))
    assert isinstance(event, Retry)
    assert event.delay_ms == 70
    assert state.take_frames() == []
    state.retry()
    assert [frame.seq for frame in state.take_frames()] == [1, 2, 3]
    assert state.on_frame(error_frame(1, 2, SequenceGap("late echo of the first try"))) == []
    assert state.on_frame(error_frame(1, 3, SequenceGap("late echo of the first try"))) == []
    (event,) = state.on_frame(error_frame(1, 3, SequenceGap("a real one")))
    assert isinstance(event, Failed)


@pytest.mark.parametrize("error", [NotOwner("not yours"), BadStates("wrong width"), SequenceGap("skipped")])
def test_lasting_refusals_end_the_session(error: FlLlamaError) -> None:
    state = live_session()
    state.submit(0, rows_of(Codec.FP16, [0]))
    state.take_frames()
    (event,) = state.on_frame(error_frame(1, 1, error))
    assert isinstance(event, Failed)
    assert type(event.error) is type(error)
    assert state.take_frames()[0].kind is Kind.CLOSE
    assert state.on_frame(error_frame(1, 1, error)) == []


def test_window_refusal_passes_without_a_hint() -> None:
    state = live_session()
    state.submit(0, rows_of(Codec.FP16, [0]))
    state.take_frames()
    (event,) = state.on_frame(error_frame(1, 1, WindowExceeded("too much")))
    assert isinstance(event, Retry)


def test_forgotten_session_is_attached_again() -> None:
    state = live_session()
    state.submit(0, rows_of(Codec.FP16, [0]))
    state.take_frames()
    assert state.on_frame(error_frame(1, 1, UnknownSession("who?"))) == []
    assert [frame.kind for frame in state.take_frames()] == [Kind.ATTACH]
    (event,) = state.on_frame(error_frame(1, 0, UnknownSession("who?")))
    assert isinstance(event, Failed)


@pytest.mark.parametrize(
    "frame",
    [
        Frame(Kind.REPLY, Codec.FP16, handle=1, seq=2, count=1, payload=b"\0" * 8),
        Frame(Kind.REPLY, Codec.FP16, handle=1, seq=1, count=2, payload=b"\0" * 16),
        Frame(Kind.REPLY, Codec.FP32, handle=1, seq=1, count=1, payload=b"\0" * 16),
        Frame(Kind.REPLY, Codec.FP16, handle=1, seq=1, count=1, payload=b"\0" * 7),
        Frame(Kind.HELLO, handle=1),
    ],
)
def test_answers_that_fit_no_question_end_the_session(frame: Frame) -> None:
    state = live_session()
    state.submit(0, rows_of(Codec.FP16, [0]))
    state.take_frames()
    (event,) = state.on_frame(frame)
    assert isinstance(event, Failed)
    assert isinstance(event.error, RemoteError | BadStates)


def test_a_redirected_session_is_attached_elsewhere() -> None:
    state = live_session()
    state.submit(0, rows_of(Codec.FP16, [0]))
    state.take_frames()
    moved = Frame(Kind.MOVED, handle=1, payload=Moved(address="http://other").to_bytes())
    assert state.on_frame(moved) == [Redirected("http://other")]
    state.detach()
    state.attach(2, 65536, 100)
    assert [frame.kind for frame in state.take_frames()] == [Kind.ATTACH]


def test_a_closed_session_is_not_attached_again() -> None:
    state = live_session()
    state.close()
    state.detach()
    state.attach(2, 65536, 100)
    assert [frame.kind for frame in state.take_frames()] == [Kind.CLOSE]
    assert state.on_frame(error_frame(2, 0, UnknownSession("who?"))) == [Closed()]


def test_a_refused_fork_is_asked_for_again() -> None:
    parent = live_session()
    rows = rows_of(Codec.FP16, [0])
    parent.submit(0, rows)
    parent.take_frames()
    parent.on_frame(Frame(Kind.REPLY, Codec.FP16, handle=1, seq=1, count=1, payload=rows.data))
    child = parent.fork(OPENING, 1)
    child.attach(2, 65536, 100)
    assert [frame.kind for frame in child.take_frames()] == [Kind.FORK]
    (event,) = child.on_frame(error_frame(2, 0, OutOfPages("full", retry_after_ms=10)))
    assert isinstance(event, Retry)
    child.retry()
    assert [frame.kind for frame in child.take_frames()] == [Kind.FORK]


def test_close_is_confirmed() -> None:
    state = live_session()
    state.close()
    assert [frame.kind for frame in state.take_frames()] == [Kind.CLOSE]
    assert state.on_frame(Frame(Kind.CLOSE, handle=1)) == [Closed()]
    state.close()
    assert state.take_frames() == []


def test_log_joins_rows_of_one_codec() -> None:
    log = StepLog(WIDTH)
    log.write(0, rows_of(Codec.FP32, [0]))
    log.write(1, rows_of(Codec.FP16, [1, 2, 3]))
    log.write(3, rows_of(Codec.FP16, [4, 5]))
    assert len(log) == 5
    assert list(log.read(0, 5)) == [(0, rows_of(Codec.FP32, [0])), (1, rows_of(Codec.FP16, [1, 2, 4, 5]))]
    assert list(log.read(2, 3)) == [(2, rows_of(Codec.FP16, [2]))]
    assert list(log.read(5, 5)) == []
