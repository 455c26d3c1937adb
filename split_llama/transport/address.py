"""What a user types after `--server`, and the URLs made from it."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from split_llama.errors import UsageError

_SCHEMES = {"http": False, "ws": False, "https": True, "wss": True}


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """A server: `authority` is `host:port`, `root` the path prefix behind a reverse proxy (empty or `/prefix`)."""

    authority: str
    root: str
    secure: bool

    @classmethod
    def parse(cls, url: str) -> ServerAddress:
        """Read `http(s)://host:port[/root-path]` (`ws` and `wss` mean the same). Raises `UsageError`."""
        expected = "expected http://HOST:PORT or https://HOST:PORT[/ROOT-PATH]"
        try:
            parts = urlsplit(url.strip())
            _ = parts.port  # a property that raises on a bad port
        except ValueError as error:
            raise UsageError(f"the server's address {url!r} cannot be read ({error}): {expected}") from None
        if parts.scheme not in _SCHEMES:
            raise UsageError(f"the server's address {url!r} has no http:// or https:// in front: {expected}")
        if parts.username is not None:
            raise UsageError(f"the server's address holds a user name: give the key with --api-key instead; {expected}")
        if not parts.hostname or parts.query or parts.fragment or any(letter.isspace() for letter in parts.path):
            raise UsageError(f"the server's address {url!r} is not complete or has too much: {expected}")
        return cls(parts.netloc, parts.path.rstrip("/"), _SCHEMES[parts.scheme])

    @property
    def host(self) -> str:
        """The host without brackets."""
        return urlsplit(f"//{self.authority}").hostname or ""

    @property
    def port(self) -> int:
        """The port, also where the scheme implies it."""
        return urlsplit(f"//{self.authority}").port or (443 if self.secure else 80)

    @property
    def base(self) -> str:
        """The address as an http(s) URL without a trailing slash."""
        return f"{'https' if self.secure else 'http'}://{self.authority}{self.root}"

    @property
    def stream(self) -> str:
        """The ws(s) URL of the frame stream."""
        return f"{'wss' if self.secure else 'ws'}://{self.authority}{self.root}/v1/stream"

    @property
    def frames(self) -> str:
        """The http(s) URL that takes frames by POST."""
        return f"{self.base}/v1/frames"


def authorization(api_key: str | None) -> dict[str, str]:
    """Give the header that carries an API key; none without a key. Raises `UsageError` when a key fits no header."""
    if api_key is None:
        return {}
    if not api_key or not all("!" <= letter <= "~" for letter in api_key):
        raise UsageError(
            "the API key is empty or has a blank, a line break or a non-ASCII letter: check how it was copied"
        )
    return {"Authorization": f"Bearer {api_key}"}
