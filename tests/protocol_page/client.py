"""A client of docs/protocol.md over either link: one connection and its sessions."""

from __future__ import annotations

from typing import Any

from protocol_page import wire
from protocol_page.session import Refused, Session
from protocol_page.wire import Frame, Link, control, join


class Client:
    """One connection and its sessions."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.hello: dict[str, Any] = {}
        self.sessions: dict[int, Session] = {}
        self.strays: list[Frame] = []  # frames of no session here
        self._handles = 0
        self.send([control(wire.HELLO, {"protocol": 1, "client": "the page's client"})])
        while not self.hello:
            self.pump()

    @property
    def width(self) -> int:
        """The hidden size."""
        return int(self.hello["hidden_size"])

    def max_rows(self, size: int) -> int:
        """How many rows of `size` bytes one step takes."""
        return min(int(self.hello["max_step_rows"]), (int(self.hello["max_frame_bytes"]) - wire.HEADER.size) // size)

    def new_session(self, blocks: tuple[int, int] | None = None) -> Session:
        """A session under the next handle, which the server does not know of yet."""
        self._handles += 1
        start, stop = blocks or self.hello["blocks"]
        session = self.sessions[self._handles] = Session(self, self._handles, (start, stop))
        return session

    def open(self) -> Session:
        """Send OPEN; the Grant may come later."""
        session = self.new_session()
        self.send([self.claim(wire.OPEN, session)])
        return session

    def claim(self, kind: int, session: Session) -> Frame:
        """The OPEN or ATTACH of a session."""
        fields = {"session": session.id, "secret": session.secret, "blocks": list(session.blocks)}
        return control(kind, fields | {"geometry": self.hello["geometry"]}, handle=session.handle)

    def attach(self, session: Session) -> None:
        """Take over a session of another connection, with its log and its unanswered steps."""
        self._handles += 1
        session.client, session.handle, session.grant = self, self._handles, None
        self.sessions[session.handle] = session
        self.send([self.claim(wire.ATTACH, session)])
        resyncs = session.resyncs
        session.wait_ready()
        if session.resyncs == resyncs:
            self.send(session.resend())

    def send(self, frames: list[Frame]) -> None:
        """Send frames as few messages, each within the limit."""
        limit = int(self.hello.get("max_message_bytes", wire.FIRST_FRAME_LIMIT))
        message: list[Frame] = []
        for frame in frames:
            if message and sum(other.size for other in message) + frame.size > limit:
                self.link.send(join(message))
                message = []
            message.append(frame)
        if message:
            self.link.send(join(message))

    def flush(self) -> None:
        """Send what the windows of all sessions take, in common messages."""
        self.send([frame for session in self.sessions.values() for frame in session.sendable()])

    def pump(self) -> None:
        """Take one message and send what it made room for."""
        for frame in wire.parse_message(self.link.receive()):
            if frame.handle in self.sessions:
                self.sessions[frame.handle].take(frame)
            elif frame.kind == wire.HELLO:
                self.hello = frame.json()
            elif frame.kind == wire.ERROR and frame.handle == 0:
                raise Refused(frame)
            else:
                self.strays.append(frame)
        self.flush()
