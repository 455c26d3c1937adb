"""Sessions, steps and drafts against a real server, by a client that knows nothing but docs/protocol.md."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from protocol_page import wire
from protocol_page.client import Client
from protocol_page.session import Refused, Session
from protocol_page.wire import DRAFT, REPLY_LAST, REPLY_NONE, Frame, Rows, exchange

GOLDEN = Path(__file__).parents[1] / "wire" / "golden"
CODECS = ["fp32", "bf16", "fp16", "int8"]


def same(got: Rows, wanted: Rows) -> None:
    """Equal but for the order of fp32 additions."""
    np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-4)


def plain(client: Client, *runs: Rows) -> Rows:
    """The oracle: the runs of rows as steps of a fresh session; the last run's reply."""
    session = client.open()
    replies = [session.step(run) for run in runs]
    session.close()
    return replies[-1]


def code_of(session: Session, ticket: int) -> int:
    """The code of the ERROR that a step gets."""
    with pytest.raises(Refused) as refused:
        session.wait(ticket)
    assert refused.value.frame.aux == refused.value.code
    return refused.value.code


@pytest.mark.parametrize("vector", json.loads((GOLDEN / "codecs.json").read_text()), ids=lambda v: v["name"])
def test_the_codecs_give_the_golden_bytes_and_values(vector: dict[str, object]) -> None:
    codec, width = CODECS.index(str(vector["codec"])), int(str(vector["width"]))
    data = wire.encode_rows(np.array(vector["states"], np.float32), codec)
    assert data.hex() == vector["bytes"]
    decoded = np.array(vector["decoded"], np.float32)
    np.testing.assert_array_equal(wire.decode_rows(data, codec, width), decoded)


def test_frames_are_the_golden_bytes() -> None:
    for vector in json.loads((GOLDEN / "frames.json").read_text()):
        (frame,) = wire.parse_message(bytes.fromhex(vector["frame"]))
        assert frame.encode().hex() == vector["frame"]
        for name in ("codec", "flags", "aux", "handle", "seq", "ack", "first", "count"):
            assert getattr(frame, name) == vector[name]
        assert (frame.kind, frame.payload.hex()) == (getattr(wire, vector["kind"]), vector["payload"])


def test_hello_tells_the_model_and_the_limits(client: Client) -> None:
    hello = client.hello
    assert (hello["protocol"], hello["blocks"], hello["hidden_size"]) == (1, [1, 3], 32)
    assert hello["codecs"] == CODECS
    assert hello["max_frame_bytes"] == 65536
    assert hello["max_message_bytes"] >= hello["max_frame_bytes"]
    assert hello["max_model_len"] == 256


def test_steps_follow_open_at_once(client: Client, states: Rows) -> None:
    session = client.open()
    tickets = [session.submit(states[at : at + 3], at) for at in (0, 3, 6)]
    assert session.grant is None
    replies = [session.wait(ticket) for ticket in tickets]
    assert session.grant is not None
    assert (session.grant["length"], session.grant["seq"]) == (0, 0)
    same(np.concatenate(replies), plain(client, states[:9]))


@pytest.mark.parametrize("codec", range(4), ids=CODECS)
def test_every_codec_is_read_and_answered(client: Client, states: Rows, codec: int) -> None:
    session = client.open()
    frame, reply = session.wait_frame(session.submit(states[:5], codec=codec))
    assert frame.codec == codec
    read = wire.decode_rows(wire.encode_rows(states[:5], codec), codec, 32)
    wanted = plain(client, read)
    rounding = np.abs(wanted).max() * (1e-4, 2**-8, 2**-10, 1 / 200)[codec]
    np.testing.assert_allclose(reply, wanted, rtol=0, atol=rounding)


def test_reply_flags_choose_the_rows(client: Client, states: Rows) -> None:
    session = client.open()
    every = session.wait_frame(session.submit(states[:4]))
    last = session.wait_frame(session.submit(states[4:8], flags=REPLY_LAST))
    none = session.wait_frame(session.submit(states[8:12], flags=REPLY_NONE))
    assert [(frame.first, frame.count) for frame, _ in (every, last)] == [(0, 4), (7, 1)]
    assert (none[0].count, none[0].payload) == (0, b"")
    wanted = plain(client, states[:13])
    same(every[1], wanted[:4])
    same(last[1], wanted[7:8])
    same(session.step(states[12:13]), wanted[12:])


def test_sessions_share_a_connection_and_a_message(client: Client, states: Rows) -> None:
    sessions = [client.open() for _ in range(3)]
    starts = (0, 20, 40)
    replies: list[list[Rows]] = [[], [], []]
    for at in range(0, 8, 2):
        tickets = [
            session.submit(states[start + at : start + at + 2]) for session, start in zip(sessions, starts, strict=True)
        ]  # the first wait sends all three in one message
        for got, session, ticket in zip(reversed(replies), reversed(sessions), reversed(tickets), strict=True):
            got.append(session.wait(ticket))
    for got, start in zip(replies, starts, strict=True):
        same(np.concatenate(got), plain(client, states[start : start + 8]))


def test_a_long_prompt_keeps_to_the_window(client: Client, states: Rows) -> None:
    session = client.open()
    rows = np.tile(states, (4, 1))[:200]
    tickets = [session.submit(rows[at : at + 1], at) for at in range(200)]
    replies = np.concatenate([session.wait(ticket) for ticket in tickets])
    same(replies[-3:], plain(client, rows[:64], rows[64:128], rows[128:192], rows[192:])[-3:])


def test_a_repeated_step_gets_its_kept_reply_until_it_is_acknowledged(client: Client, states: Rows) -> None:
    session = client.open()
    session.step(states[:3])
    second = Frame(
        wire.STEP, handle=session.handle, seq=2, ack=1, first=3, count=1, payload=wire.encode_rows(states[3:4], 0)
    )
    (kept,) = exchange(client.link, [second], 1)
    (again,) = exchange(client.link, [second], 1)
    assert again == kept
    assert kept.kind == wire.REPLY
    old = Frame(wire.STEP, handle=session.handle, seq=1, ack=1, count=1, payload=second.payload)
    (stale,) = exchange(client.link, [old], 1)
    assert (stale.kind, stale.aux, stale.handle, stale.seq) == (wire.ERROR, 56, session.handle, 1)
    session.next_seq = 3
    same(session.step(states[4:5], 4), plain(client, states[:5])[-1:])


def test_gaps_are_refused_and_the_session_goes_on(client: Client, states: Rows) -> None:
    session = client.open()
    session.step(states[:3])
    session.next_seq = 7
    assert code_of(session, session.submit(states[3:4])) == 55
    session.next_seq = 2
    far = session.submit(states[3:4], 9)
    behind = session.submit(states[4:5], 4)
    assert (code_of(session, far), code_of(session, behind)) == (54, 55)
    assert session.next_seq == 2
    same(session.step(states[3:5]), plain(client, states[:5])[-2:])
    for flags in (REPLY_LAST | REPLY_NONE, wire.TREE, 32):
        assert code_of(session, session.submit(states[5:6], flags=flags)) in (51, 52)
    same(session.step(states[5:6]), plain(client, states[:6])[-1:])


def test_first_rolls_back(client: Client, states: Rows) -> None:
    session = client.open()
    session.step(states[:8])
    same(session.step(states[20:22], 5), plain(client, np.concatenate([states[:5], states[20:22]]))[-2:])
    same(session.step(states[30:31]), plain(client, states[:5], states[20:22], states[30:31]))


@pytest.mark.parametrize("accept", [(), (0, 1, 2)], ids=["by first", "by ACCEPT"])
def test_a_chain_keeps_what_the_next_step_says(client: Client, states: Rows, accept: tuple[int, ...]) -> None:
    session = client.open()
    session.step(states[:5])
    same(session.step(states[5:10], flags=DRAFT), plain(client, states[:5], states[5:10]))
    assert session.length == 5
    same(session.step(states[40:41], 8, accept=accept), plain(client, states[:8], states[40:41]))
    same(session.step(states[41:42]), plain(client, states[:8], states[40:42])[-1:])


def test_a_tree_accepts_a_path_and_may_be_followed_by_another(client: Client, states: Rows) -> None:
    # 0 - 1 - 3 and 0 - 2 - 4 - 5
    tree = (0b1, 0b11, 0b101, 0b1011, 0b10101, 0b110101)
    session = client.open()
    session.step(states[:6])
    nodes = states[10:16]
    outputs = session.step(nodes, tree=tree, flags=DRAFT)
    left, right = [0, 1, 3], [0, 2, 4, 5]
    same(outputs[left], plain(client, states[:6], nodes[left]))
    same(outputs[right], plain(client, states[:6], nodes[right]))
    kept = np.concatenate([states[:6], nodes[[0, 2, 4]]])
    more = session.step(states[20:23], 9, tree=(1, 3, 5), flags=DRAFT, accept=(0, 2, 4))
    same(more[[0, 2]], plain(client, kept, states[[20, 22]]))
    same(session.step(states[30:31], 11, accept=(0, 2)), plain(client, kept, states[[20, 22, 30]])[-1:])


def test_a_tree_is_dropped_by_first_and_a_wrong_accept_is_refused(client: Client, states: Rows) -> None:
    session = client.open()
    session.step(states[:4])
    session.step(states[10:13], tree=(1, 3, 5), flags=DRAFT)
    assert code_of(session, session.submit(states[20:21], 6, accept=(0, 1, 2))) in (51, 54)
    assert code_of(session, session.submit(states[20:21], 6, accept=(1, 2))) == 51
    assert code_of(session, session.submit(states[20:21], 5, accept=(0, 1))) == 54
    same(session.step(states[4:5], 4), plain(client, states[:5])[-1:])


def test_fork_shares_a_prefix(client: Client, states: Rows) -> None:
    session = client.open()
    session.step(states[:6])
    child = session.fork(4)
    assert child.grant is not None
    assert (child.grant["length"], child.grant["seq"]) == (4, 0)
    same(child.step(states[50:52]), plain(client, states[:4], states[50:52]))
    same(session.step(states[6:7]), plain(client, states[:7])[-1:])
    session.step(states[20:22], flags=DRAFT)
    with pytest.raises(Refused) as refused:
        session.fork(8)
    assert refused.value.code == 54


def test_cancel_drops_what_is_queued(client: Client, states: Rows) -> None:
    session = client.open()
    session.step(states[:2])
    tickets = [session.submit(states[at : at + 1], at) for at in range(2, 10)]
    answer = session.cancel(4)  # steps 2 to 9 are in the window; those below 4 still run
    assert 3 <= answer.seq <= 9
    assert answer.first == answer.seq + 1
    wanted = plain(client, states[:11])
    same(session.wait(tickets[0]), wanted[2:3])
    same(session.wait(tickets[1]), wanted[3:4])
    same(session.step(states[answer.first : answer.first + 1], answer.first), wanted[[answer.first]])


def test_close_frees_the_handle(client: Client, states: Rows) -> None:
    session = client.open()
    session.step(states[:2])
    session.close()
    again = client.new_session()
    del client.sessions[again.handle]
    again.handle = session.handle
    client.sessions[again.handle] = again
    client.send([client.claim(wire.OPEN, again)])
    same(again.step(states[:3]), plain(client, states[:3]))
