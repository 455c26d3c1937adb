"""All sessions of the server: by id, with owner, secret, and the connection they hang on. Time is given.

An entry without a mailbox has lost its connection and lives on for the grace period.
"""

from __future__ import annotations

import hashlib
import hmac
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from serving.keys import Principal
from serving.limits import TokenBucket
from serving.session import Session
from split_llama.config import BlockRange
from split_llama.errors import BadRequest, LimitExceeded, NotOwner
from split_llama.wire.control import Open
from split_llama.wire.frame import Frame, Kind


class Mailbox(Protocol):
    """Where a connection takes frames to send."""

    def put(self, frame: Frame, handle: int | None = None) -> None:
        """Queue a frame, under another handle if one is given; never blocks and never raises."""
        ...

    def unbind(self, handle: int) -> None:
        """Forget a handle whose session went elsewhere or ended."""
        ...


@dataclass(slots=True, eq=False)
class Entry:
    """One session and what surrounds it. Only `Registry` and the connection that holds it change it.

    `digests` are those of weights and tokenizer as OPEN gave them.
    """

    ident: str
    owner: str
    blocks: BlockRange
    session: Session
    opened_at: float
    active_at: float
    secret_hash: bytes = field(repr=False)
    digests: tuple[str | None, str | None]
    mailbox: Mailbox | None = None
    handle: int = 0
    detached_at: float | None = None
    verified: bool = True
    answer: Kind = Kind.OPEN
    first_step_at: float | None = None
    last_reply_at: float | None = None

    def send(self, frame: Frame) -> None:
        """Send a frame under the handle of the connection that holds the session now, if any."""
        if self.mailbox is not None:
            self.mailbox.put(frame, self.handle)

    def bind(self, mailbox: Mailbox, handle: int) -> None:
        """Hang the session on a connection; the one before forgets it."""
        if self.mailbox is not None:
            self.mailbox.unbind(self.handle)
        self.mailbox, self.handle, self.detached_at = mailbox, handle, None

    def unbind(self, now: float) -> None:
        """Take the session off its connection; the grace period begins."""
        self.mailbox, self.detached_at = None, now


def hash_secret(secret: str) -> bytes:
    """Give what is kept of a session's secret: it has 256 random bits, so its hash cannot be turned back."""
    return hashlib.sha256(secret.encode()).digest()


class Registry:
    """Sessions by id, and what each owner uses."""

    def __init__(self, max_sessions: int, idle_seconds: float, grace_seconds: float) -> None:
        self.max_sessions = max_sessions
        self.idle_seconds = idle_seconds
        self.grace_seconds = grace_seconds
        self._entries: dict[str, Entry] = {}
        self._counts: Counter[str] = Counter()
        self._buckets: dict[str, TokenBucket] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def num_running(self) -> int:
        """Give the number of sessions in the running pass."""
        return sum(bool(entry.session.running) for entry in self)

    def num_waiting(self) -> int:
        """Give the number of sessions whose steps wait for a pass."""
        return sum(bool(entry.session.queued) and not entry.session.running for entry in self)

    def count(self, owner: str) -> int:
        """Give the number of an owner's sessions."""
        return self._counts[owner]

    def find(self, ident: str, owner: str, secret: str | None = None) -> Entry | None:
        """Look a session up. Raises `NotOwner` for another's, or for a wrong secret where one is given."""
        entry = self._entries.get(ident)
        if entry is None:
            return None
        good = secret is None or hmac.compare_digest(entry.secret_hash, hash_secret(secret))
        if entry.owner != owner or not good:
            raise NotOwner("the session belongs to another owner, or its secret is not the one it was opened with")
        return entry

    def admit(self, ident: str, principal: Principal) -> None:
        """Raise `BadRequest` if the id is taken, `LimitExceeded` if there are too many sessions."""
        if ident in self._entries:
            raise BadRequest("a session of this id is open already: ATTACH to it, or draw a new id")
        limit = principal.limits.max_sessions
        if limit is not None and self._counts[principal.owner] >= limit:
            raise LimitExceeded(
                f"this key may hold {limit} sessions at once and holds {self._counts[principal.owner]}; close one",
                retry_after_ms=1000,
            )
        if len(self._entries) >= self.max_sessions:
            raise LimitExceeded(
                f"this server holds {self.max_sessions} sessions at most and all are taken; try again later",
                retry_after_ms=2000,
            )

    def add(self, request: Open, principal: Principal, session: Session, now: float) -> Entry:
        """Enter a new session; `admit` has been asked."""
        entry = Entry(
            ident=request.session,
            owner=principal.owner,
            blocks=BlockRange(*request.blocks),
            session=session,
            opened_at=now,
            active_at=now,
            secret_hash=hash_secret(request.secret),
            digests=(request.weights, request.tokenizer),
        )
        self._entries[entry.ident] = entry
        self._counts[entry.owner] += 1
        return entry

    def remove(self, entry: Entry) -> bool:
        """Close a session and forget it. Says whether its owner has none left."""
        entry.session.close()
        if entry.mailbox is not None:
            entry.mailbox.unbind(entry.handle)
            entry.mailbox = None
        if self._entries.pop(entry.ident, None) is not None:
            self._counts[entry.owner] -= 1
        if self._counts[entry.owner] <= 0:
            del self._counts[entry.owner]
            return True
        return False

    def expired(self, now: float) -> list[Entry]:
        """List sessions idle for too long, or past the grace period after their connection was lost."""
        return [entry for entry in self if self._is_expired(entry, now)]

    def _is_expired(self, entry: Entry, now: float) -> bool:
        if entry.session.running or entry.session.queued:
            return False
        if entry.detached_at is not None and now - max(entry.detached_at, entry.active_at) >= self.grace_seconds:
            return True
        return now - entry.active_at >= self.idle_seconds

    def take_tokens(self, principal: Principal, rows: int, now: float) -> None:
        """Charge rows to an owner's rate. Raises `LimitExceeded`."""
        limit = principal.limits.max_tokens_per_minute
        if limit is None:
            return
        bucket = self._buckets.get(principal.owner)
        if bucket is None or bucket.per_minute != limit:
            bucket = self._buckets[principal.owner] = TokenBucket(limit, now)
        bucket.take(rows, now)
