"""ATTACH, RESYNC and replay against a real server that is killed and started again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing

import numpy as np
import pytest
from protocol_page import wire
from protocol_page.client import Client
from protocol_page.server import Server
from protocol_page.session import Refused, Session
from protocol_page.wire import DRAFT, Disconnected, HttpLink, Rows, WebSocketLink, receive_until_closed


def same(got: Rows, wanted: Rows) -> None:
    np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-4)


def plain(client: Client, rows: Rows) -> Rows:
    """The oracle: the rows as one step of a fresh session."""
    session = client.open()
    reply = session.step(rows)
    session.close()
    return reply


@pytest.fixture
def second(server: Server) -> Iterator[Client]:
    """A client on a connection of its own."""
    with closing(WebSocketLink(server.port)) as link:
        yield Client(link)


def test_attach_from_a_second_connection_sends_the_unanswered_steps_again(
    client: Client, second: Client, states: Rows
) -> None:
    session = client.open()
    session.step(states[:4])
    tickets = [session.submit(states[at : at + 2], at) for at in (4, 6)]
    client.flush()
    client.link.close()
    second.attach(session)
    assert session.grant is not None
    assert session.resyncs == 0
    assert session.grant["seq"] <= 3
    replies = [session.wait(ticket) for ticket in tickets]
    same(np.concatenate([*replies, session.step(states[8:9])]), plain(second, states[:9])[4:])


def test_attach_takes_a_session_from_a_living_connection(client: Client, second: Client, states: Rows) -> None:
    session, other = client.open(), client.open()
    session.step(states[:4])
    second.attach(session)
    same(session.step(states[4:5]), plain(second, states[:5])[-1:])
    same(other.step(states[:3]), plain(second, states[:3]))


def test_attach_needs_the_secret(client: Client, second: Client, states: Rows) -> None:
    session = client.open()
    session.step(states[:4])
    thief = Session(second, 0, session.blocks, id=session.id)
    with pytest.raises(Refused) as refused:
        second.attach(thief)
    assert refused.value.code == 59
    same(session.step(states[4:5]), plain(client, states[:5])[-1:])


def test_attach_to_other_blocks_is_refused(client: Client, second: Client, states: Rows) -> None:
    session = client.open()
    session.step(states[:4])
    start, stop = session.blocks
    other = Session(second, 0, (start, stop - 1), id=session.id, secret=session.secret)
    with pytest.raises(Refused) as refused:
        second.attach(other)
    assert refused.value.code == 23
    same(session.step(states[4:5]), plain(client, states[:5])[-1:])


def test_attach_to_an_unknown_session_is_answered_by_resync(client: Client, second: Client, states: Rows) -> None:
    session = client.open()
    session.step(states[:4])
    session.step(states[4:6], codec=wire.INT8)
    last = session.submit(states[6:8])
    client.flush()
    stranger = Session(second, 0, session.blocks, grant=session.grant, next_seq=4, ack=2)
    stranger._log, stranger._sent, stranger._tickets = session._log, session._sent, session._tickets
    second.attach(stranger)
    assert stranger.resyncs == 1
    reply = stranger.wait(last)
    np.testing.assert_allclose(reply, session.wait(last), rtol=1e-3, atol=1e-4)
    assert stranger.next_seq == 4  # two replayed steps, one for each codec, and the last
    assert stranger.length == 8


def lose(sessions: list[Session], link: wire.Link) -> Client:
    """A new connection for sessions whose connection or server is gone."""
    client = Client(link)
    for session in sessions:
        client.attach(session)
    return client


def test_a_restarted_server_gets_everything_again(server: Server, states: Rows) -> None:
    with ExitStack() as stack:
        first = Client(stack.enter_context(closing(WebSocketLink(server.port))))
        by_http = Client(stack.enter_context(closing(HttpLink(server.port))))
        waiting, idle, chain, tree, draft = (first.open() for _ in range(5))
        polled = by_http.open()
        for session in (waiting, idle, chain, tree, draft, polled):
            session.step(states[:5])
        idle.step(states[30:32], 3)  # a rollback: the log must follow it
        chain.step(states[5:9], flags=DRAFT)
        tree.step(states[10:14], tree=(1, 3, 5, 0b1101), flags=DRAFT)
        unanswered = [
            waiting.submit(states[5:6], 5),
            waiting.submit(states[6:7], 6),
            tree.submit(states[20:21], 8, accept=(0, 2, 3)),
            draft.submit(states[10:13], 5, tree=(1, 3, 5), flags=DRAFT),
        ]
        first.flush()
        server.kill()
        assert receive_until_closed(first.link).close_code == 1006
        server.start()

        polled_step = polled.submit(states[5:6])
        with pytest.raises(Disconnected):
            polled.wait(polled_step)
        by_http.link.send(polled.resend()[0].encode())
        with pytest.raises(Disconnected) as lost:  # the server knows no connection of this name any more
            by_http.pump()
        assert lost.value.error["code"] == 41

        again = lose([waiting, idle, chain, tree, draft], stack.enter_context(closing(WebSocketLink(server.port))))
        http_again = lose([polled], stack.enter_context(closing(HttpLink(server.port))))
        assert [s.resyncs for s in (waiting, idle, chain, tree, draft, polled)] == [1] * 6
        wanted = plain(again, states[:9])
        same(waiting.wait(unanswered[0]), wanted[5:6])
        same(waiting.wait(unanswered[1]), wanted[6:7])
        same(polled.wait(polled_step), wanted[5:6])
        same(idle.step(states[40:41], 5), plain(again, states[[0, 1, 2, 30, 31, 40]])[-1:])
        # What is accepted of a draft that was answered before is replayed as settled rows.
        same(chain.step(states[20:21], 7, accept=(0, 1)), plain(again, states[[*range(7), 20]])[-1:])
        same(tree.wait(unanswered[2]), plain(again, states[[*range(5), 10, 12, 13, 20]])[-1:])
        # A draft without an answer is sent as a draft again.
        same(draft.wait(unanswered[3])[[0, 2]], plain(again, states[[*range(5), 10, 12]])[-2:])
        same(draft.step(states[20:21], 7, accept=(0, 2)), plain(again, states[[*range(5), 10, 12, 20]])[-1:])
        assert http_again.strays == []
