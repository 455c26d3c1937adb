"""API keys: who may connect, under which name and limits.

The file holds names, limits and SHA-256 hashes, never a key. A plain hash is enough because every key carries 256
random bits: there is nothing to guess that a slow password hash could slow down. A key given by `--api-key` may be
weak, but it is never written anywhere.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import secrets
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from serving.limits import NO_LIMITS, Limits
from split_llama.errors import Unauthenticated, UsageError
from split_llama.settings import nearest

ANONYMOUS = "anonymous"
COMMAND_LINE = "default"
KEY_PREFIX = "flk-"
FILE_MODE = 0o600
FILE_VERSION = 1
RECHECK_SECONDS = 1.0

log = logging.getLogger("fl_llama.keys")


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One key as the file holds it. `sha256` is hex; `created` is ISO 8601 in UTC."""

    name: str
    sha256: str
    created: str
    max_sessions: int | None = None
    max_tokens_per_minute: int | None = None

    @property
    def limits(self) -> Limits:
        """What its holder may use."""
        return Limits(self.max_sessions, self.max_tokens_per_minute)


@dataclass(frozen=True, slots=True)
class Principal:
    """Whoever stands behind a connection: the name that owns sessions, and its limits."""

    owner: str
    limits: Limits = NO_LIMITS


def hash_key(key: str) -> str:
    """Give the SHA-256 of a key in hex."""
    return hashlib.sha256(key.encode()).hexdigest()


def default_key_file() -> Path:
    """Where `split-server keys` keeps the keys unless told otherwise."""
    return Path.home() / ".config" / "fl-llama" / "keys.json"


class KeyFile:
    """The file of keys. Every change is a new file that takes the old one's place, readable by its owner only."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> tuple[ApiKey, ...]:
        """Read all keys; no file means no keys. Raises `UsageError` for a file that cannot be used."""
        try:
            document = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return ()
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise UsageError(f"cannot read the key file {self.path}: {error}") from error
        if not isinstance(document, dict) or document.get("version") != FILE_VERSION:
            raise UsageError(
                f"{self.path} is no key file of version {FILE_VERSION}: make one with split-server keys create"
            )
        return tuple(self._entry(raw) for raw in document.get("keys", []))

    def _entry(self, raw: Any) -> ApiKey:
        try:
            key = ApiKey(**raw)
            good = isinstance(key.name, str) and len(bytes.fromhex(key.sha256)) == hashlib.sha256().digest_size
            numbers = (key.max_sessions, key.max_tokens_per_minute)
            good = good and all(number is None or (type(number) is int and number >= 0) for number in numbers)
        except (TypeError, ValueError):
            good = False
        if not good:
            fields = ", ".join(ApiKey.__dataclass_fields__)
            raise UsageError(f"{self.path}: an entry of keys is malformed; expected the fields {fields}")
        return key

    def create(self, name: str, limits: Limits) -> str:
        """Add a key and give it: the only time that it is seen. Raises `UsageError` if the name is taken."""
        keys = self.read()
        if not name or name in (ANONYMOUS, COMMAND_LINE) or any(key.name == name for key in keys):
            raise UsageError(f"the key name {name!r} is taken or reserved; choose another")
        key = KEY_PREFIX + secrets.token_urlsafe(32)
        created = datetime.now(UTC).isoformat(timespec="seconds")
        entry = ApiKey(name, hash_key(key), created, limits.max_sessions, limits.max_tokens_per_minute)
        self._write([*keys, entry])
        return key

    def revoke(self, name: str) -> None:
        """Remove a key. Raises `UsageError` if there is none of that name."""
        keys = self.read()
        if all(key.name != name for key in keys):
            raise UsageError(f"no key is named {name!r} in {self.path}{nearest(name, [key.name for key in keys])}")
        self._write([key for key in keys if key.name != name])

    def _write(self, keys: Iterable[ApiKey]) -> None:
        document = {"version": FILE_VERSION, "keys": [asdict(key) for key in keys]}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # mkstemp makes the file with mode 0600 from its first byte on.
            handle, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=self.path.name)
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    json.dump(document, file, indent=2)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, self.path)
            except BaseException:
                os.unlink(temporary)
                raise
        except OSError as error:
            raise UsageError(f"cannot write the key file {self.path}: {error}") from error


class KeyRing:
    """Says who a key belongs to. Looks at the key file again when it has changed.

    A file that cannot be read any more leaves the keys as they were, and is logged: a half-edited file must not lock
    everybody out, nor let anybody in.
    """

    def __init__(self, api_key: str | None = None, key_file: Path | None = None) -> None:
        self._fixed = (ApiKey(COMMAND_LINE, hash_key(api_key), ""),) if api_key else ()
        self._file = KeyFile(key_file) if key_file else None
        self._stamp = self._stat()
        self._stored = self._file.read() if self._file else ()
        self._checked_at = time.monotonic()

    @property
    def is_open(self) -> bool:
        """Say whether anybody may connect because no key was ever configured."""
        return not self._fixed and self._file is None

    def authenticate(self, authorization: str | None) -> Principal:
        """Check an Authorization header's value. Raises `Unauthenticated`."""
        if self.is_open:
            return Principal(ANONYMOUS)
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise Unauthenticated("this server asks for an API key: send the header `Authorization: Bearer KEY`")
        presented = hash_key(key.strip())
        found = None
        # All are compared, each in constant time, so that the time taken says nothing about any.
        for entry in self._keys():
            if hmac.compare_digest(presented, entry.sha256):
                found = entry
        if found is None:
            raise Unauthenticated("the API key is unknown or was revoked; ask the server's operator for one")
        return Principal(found.name, found.limits)

    def current(self, owner: str) -> Principal | None:
        """Give an owner's standing now; `None` once the key is revoked."""
        if self.is_open:
            return Principal(owner)
        return next((Principal(key.name, key.limits) for key in self._keys() if key.name == owner), None)

    def _keys(self) -> tuple[ApiKey, ...]:
        now = time.monotonic()
        if self._file is not None and now - self._checked_at >= RECHECK_SECONDS:
            self._checked_at = now
            self._reload(self._file)
        return self._fixed + self._stored

    def _reload(self, file: KeyFile) -> None:
        stamp = self._stat()
        if stamp == self._stamp:
            return
        try:
            self._stored = file.read()
        except UsageError as error:
            log.error("keys kept as they were: %s", error.message)
        else:
            log.info("key file read again keys=%d", len(self._stored))
        self._stamp = stamp

    def _stat(self) -> tuple[int, int, int] | None:
        if self._file is None:
            return None
        try:
            stat = self._file.path.stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_size, stat.st_ino
