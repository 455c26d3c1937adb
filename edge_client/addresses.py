"""Which server comes next: the one in use, its fallbacks, and where a server says that it has moved. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from split_llama.errors import RemoteError, UsageError
from split_llama.transport.address import ServerAddress

MOST_MOVES = 4


class Addresses:
    """The servers the user named, the first one in use at first, and at most one that a server named."""

    def __init__(self, urls: Sequence[str]) -> None:
        self._named = list(dict.fromkeys(ServerAddress.parse(url) for url in urls))
        if not self._named:
            raise UsageError("which server? At least one address is needed")
        self._current = self._named[0]
        self._moves = 0

    @property
    def current(self) -> ServerAddress:
        """The server in use, or the next one to be asked."""
        return self._current

    def round(self) -> list[ServerAddress]:
        """Give every server once, in the order to ask them: the current one, those after it, those before it."""
        if self._current not in self._named:
            return [self._current, *self._named]
        place = self._named.index(self._current)
        return self._named[place:] + self._named[:place]

    def use(self, address: ServerAddress) -> None:
        """This one answered."""
        self._current = address

    def move(self, url: str) -> None:
        """The current server named `url` in its place: ask there first.

        Raises `RemoteError` when it cannot be read, gives up TLS, or is one of too many in a row.
        """
        try:
            address = ServerAddress.parse(url)
        except UsageError as error:
            raise RemoteError(f"{self._current.base} says it has moved, but not where: {error.message}") from error
        if self._current.secure and not address.secure:
            raise RemoteError(
                f"{self._current.base} says it has moved to {address.base}, which has no TLS: nothing is sent there. "
                "If that is right, start again with that address"
            )
        self._moves += 1
        if self._moves > MOST_MOVES:
            raise RemoteError(
                f"{self._current.base} says it has moved to {address.base}, the {self._moves}th move without an answer "
                "in between: the servers send us in circles. Try again later, or ask who runs them"
            )
        self._current = address

    def answered(self) -> None:
        """The current server does what it is there for: it may move again."""
        self._moves = 0
