"""What a server refuses, alone or with the connection, and the HTTP form."""

from __future__ import annotations

import secrets
from contextlib import closing

import numpy as np
import pytest
from protocol_page import wire
from protocol_page.client import Client
from protocol_page.server import Server
from protocol_page.session import Refused
from protocol_page.wire import (
    Disconnected,
    Frame,
    HttpLink,
    Link,
    Rows,
    WebSocketLink,
    control,
    exchange,
    receive_until_closed,
)

HELLO = control(wire.HELLO, {"protocol": 1, "client": "limits"})
STEP = Frame(wire.STEP, handle=1, seq=1, count=1, payload=bytes(128)).encode()
FATAL = {
    "magic": (b"LF" + STEP[2:], 41, 4401, 400),
    "version": (STEP[:2] + b"\x02" + STEP[3:], 42, 4402, 426),
    "kind": (Frame(15).encode(), 41, 4401, 400),
    "cut short": (STEP[:-1], 41, 4401, 400),
    "oversized frame": (Frame(wire.STEP, handle=1, payload=bytes(65536)).encode(), 43, 1009, 413),
    "oversized message": (Frame(wire.CLOSE, handle=1, payload=bytes(60000)).encode() * 18, 43, 1009, 413),
}
NOT_FINITE = {
    wire.FP32: np.array([np.nan] + [1.0] * 31, "<f4").tobytes(),
    wire.BF16: b"\x80\x7f" * 32,
    wire.FP16: b"\x00\x7e" * 32,
    wire.INT8: bytes(32) + b"\x00\x7c",
}


@pytest.mark.parametrize("name", FATAL)
def test_broken_framing_closes_one_connection_alone(server: Server, client: Client, states: Rows, name: str) -> None:
    message, code, close_code, status = FATAL[name]
    bystander = client.open()
    bystander.step(states[:2])
    with closing(WebSocketLink(server.port)) as link:
        exchange(link, [HELLO], 1)
        link.send(message)
        (error,) = wire.parse_message(link.receive())
        assert (error.kind, error.handle, error.aux, error.json()["code"]) == (wire.ERROR, 0, code, code)
        with pytest.raises(Disconnected) as closed:
            link.receive()
        assert closed.value.close_code == close_code
    with closing(HttpLink(server.port)) as posts:
        exchange(posts, [HELLO], 1)
        posts.send(message)
        with pytest.raises(Disconnected) as refused:
            posts.receive()
        assert (refused.value.close_code, refused.value.error["code"]) == (status, code)
    bystander.step(states[2:4])


def test_anything_before_hello_is_fatal(server: Server) -> None:
    with closing(WebSocketLink(server.port)) as link:
        link.send(STEP)
        assert wire.parse_message(link.receive())[0].aux == 41
        with pytest.raises(Disconnected) as closed:
            link.receive()
        assert closed.value.close_code == 4401


def test_a_lost_connection_keeps_its_sessions(server: Server, client: Client, states: Rows) -> None:
    with closing(WebSocketLink(server.port)) as link:
        broken = Client(link)
        session = broken.open()
        before = session.step(states[:4])
        link.send(b"no frame")
        receive_until_closed(link)
    client.attach(session)
    assert session.resyncs == 0
    np.testing.assert_allclose(session.step(states[:4], 0), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("codec", NOT_FINITE)
def test_states_that_are_not_finite_are_refused_alone(client: Client, states: Rows, codec: int) -> None:
    one, bad, two = (client.open() for _ in range(3))
    bad.step(states[:2])
    tickets = one.submit(states[:3]), two.submit(states[:3])
    poison = Frame(wire.STEP, codec, handle=bad.handle, seq=2, ack=1, first=2, count=1, payload=NOT_FINITE[codec])
    client.send([*one.sendable(), poison, *two.sendable()])
    np.testing.assert_allclose(one.wait(tickets[0]), two.wait(tickets[1]), rtol=1e-4, atol=1e-5)
    while not bad.refusals:
        client.pump()
    refused = bad.refusals.pop(0)
    assert (refused.code, refused.frame.handle, refused.frame.seq) == (53, bad.handle, 2)
    assert np.isfinite(bad.step(states[2:3])).all()


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"blocks": [0, 3]}, 60),
        ({"geometry": "0" * 64}, 23),
        ({"weights": "0" * 64}, 23),
        ({"surprise": 1}, 51),
        ({"secret": "short"}, 51),
    ],
)
def test_a_refused_open_refuses_its_steps(client: Client, states: Rows, fields: dict[str, object], code: int) -> None:
    alive = client.open()
    claim = {"session": secrets.token_hex(16), "secret": secrets.token_hex(32), "blocks": [1, 3]}
    step = Frame(wire.STEP, handle=99, seq=1, count=1, payload=wire.encode_rows(states[:1], 0))
    client.send([control(wire.OPEN, claim | fields, handle=99), step])
    while len(client.strays) < 2:
        client.pump()
    assert [(frame.kind, frame.handle, frame.aux) for frame in client.strays] == [
        (wire.ERROR, 99, code), (wire.ERROR, 99, 58),
    ]  # fmt: skip
    alive.step(states[:1])


def test_a_session_ends_at_the_context_and_lives_on(client: Client, states: Rows) -> None:
    session = client.open()
    for at in range(0, 256, 64):
        session.step(states, at)
    with pytest.raises(Refused) as refused:
        session.step(states[:1])
    assert refused.value.code == 11
    session.step(states[:1], 255)


def test_http_gives_the_bytes_of_the_websocket(server: Server, states: Rows) -> None:
    def talk(link: Link) -> list[bytes]:
        claim = {"session": secrets.token_hex(16), "secret": secrets.token_hex(32), "blocks": [1, 3]}
        conversation = [HELLO, control(wire.OPEN, claim, handle=5)]
        for codec in range(4):
            rows = states[3 * codec : 3 * codec + 3]
            conversation.append(
                Frame(wire.STEP, codec, codec % 3, 0, 5, codec + 1, codec, 3 * codec, 3, wire.encode_rows(rows, codec))
            )
        conversation += [
            Frame(wire.STEP, handle=5, seq=9, ack=4, first=12, count=1, payload=bytes(128)),
            Frame(wire.CANCEL, handle=5, seq=5),
            Frame(wire.CLOSE, handle=5),
        ]
        return [wire.join(exchange(link, [frame], 1)) for frame in conversation]

    with closing(WebSocketLink(server.port)) as stream, closing(HttpLink(server.port)) as posts:
        assert talk(posts) == talk(stream)
        assert set(posts.statuses) == {200}


def test_http_carries_whole_conversations(server: Server, client: Client, states: Rows) -> None:
    with closing(HttpLink(server.port)) as link:
        posts = Client(link)
        one, two = posts.open(), posts.open()
        tickets = [one.submit(states[at : at + 2], at) for at in range(0, 20, 2)]
        other = two.step(states[:3])
        replies = np.concatenate([one.wait(ticket) for ticket in tickets])
        np.testing.assert_allclose(replies[:3], other, rtol=1e-3, atol=1e-4)
        client.attach(one)  # the WebSocket takes the session over
        np.testing.assert_allclose(one.step(states[:20], 0), replies, rtol=1e-3, atol=1e-4)
        link.send(b"")
        with pytest.raises(TimeoutError):
            link.receive(patience=0)
        assert link.statuses[-1] == 204
