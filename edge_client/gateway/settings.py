"""What a user can set on the gateway, beside the edge's own settings. No heavy imports: `--help` runs this."""

from __future__ import annotations

import ipaddress
import math
from dataclasses import dataclass
from pathlib import Path

from split_llama.errors import UsageError
from split_llama.settings import setting

SECTION = "gateway"
LOG_LEVELS = ("debug", "info", "warning", "error")
WILDCARD = "*"


def _at_least_one(value: float) -> None:
    if value < 1:
        raise ValueError("expected a number of at least 1")


def _seconds(value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError("expected seconds above 0")


def _not_negative(value: float) -> None:
    if value < 0:
        raise ValueError("expected a number of at least 0")


def _port(value: int) -> None:
    if not 0 <= value < 65536:
        raise ValueError("expected a port between 0 and 65535 (0 takes any free one)")


@dataclass(frozen=True)
class GatewaySettings:
    """Everything that shapes the gateway; one object per process, never mutated."""

    host: str = setting("127.0.0.1", "address to listen at; any but a loopback address needs a gateway key")
    port: int = setting(8000, "port to listen at; 0 takes any free one", check=_port)
    gateway_key: str | None = setting(None, "a key that callers must send", secret=True, metavar="KEY")
    gateway_key_file: Path | None = setting(None, "file of such keys, one per line; # begins a comment")
    served_model_name: str | None = setting(
        None, "name under which the model is listed; default: the server's", metavar="NAME"
    )
    max_concurrent: int = setting(16, "answers made at once", check=_at_least_one, metavar="N")
    max_queued: int = setting(64, "requests that may wait for their turn", check=_not_negative, metavar="N")
    max_n: int = setting(8, "most answers to one prompt (n); never more than --max-concurrent", check=_at_least_one)
    reader_timeout: float = setting(
        30.0, "a stream that nobody reads for so many seconds is ended", check=_seconds, metavar="S"
    )
    allowed_hosts: tuple[str, ...] = setting(
        (), "names under which this gateway may be addressed, beside this machine's own; * for any", metavar="NAME"
    )
    allowed_origins: tuple[str, ...] = setting(
        (), "web pages elsewhere that may use it, such as https://chat.example; * for any", metavar="ORIGIN"
    )
    log_level: str = setting("info", "how much to log", choices=LOG_LEVELS)

    def __post_init__(self) -> None:
        # Names are compared with what `urlsplit` and browsers give, which is lower case.
        object.__setattr__(self, "host", self.host.lower())
        for field in ("allowed_hosts", "allowed_origins"):
            object.__setattr__(self, field, tuple(name.lower() for name in getattr(self, field)))

    @property
    def is_loopback(self) -> bool:
        """Say whether only this machine can connect."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def keys(self) -> tuple[str, ...]:
        """Give the keys that callers may send; none at all lets everybody in. Raises `UsageError`."""
        keys = [self.gateway_key] if self.gateway_key is not None else []
        path = self.gateway_key_file
        if path is not None:
            try:
                lines = path.read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise UsageError(f"cannot read --gateway-key-file {path}: {error}") from error
            found = [line.split("#", 1)[0].strip() for line in lines]
            keys += [key for key in found if key]
            if not any(found):
                raise UsageError(f"--gateway-key-file {path} holds no key; write one per line")
        if any(not key or not key.isascii() or any(c.isspace() for c in key) for key in keys):
            raise UsageError("a gateway key must be ASCII text without spaces, and not empty")
        return tuple(dict.fromkeys(keys))

    def check(self) -> None:
        """Raise `UsageError` for settings that do not go together."""
        if not self.is_loopback and not self.keys():
            raise UsageError(
                f"with --host {self.host} anybody on the network could use this gateway; give --gateway-key KEY or "
                "--gateway-key-file FILE, or keep --host 127.0.0.1"
            )
        for origin in self.allowed_origins:
            if origin != WILDCARD and "://" not in origin:
                raise UsageError(f"--allowed-origins {origin}: expected an origin such as https://chat.example, or *")
