"""Small files of the user that must not be lost or read by others: written atomically, mode 0600, under one lock."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock

from split_llama.errors import CacheError

SECRET_BYTES = 32


@contextlib.contextmanager
def cache_errors(what: str) -> Iterator[None]:
    """Turn `OSError` (a full disk, permissions) into `CacheError` that says what was being done."""
    try:
        yield
    except OSError as error:
        place = f" {error.filename}" if error.filename else ""
        reason = error.strerror or str(error)
        raise CacheError(f"cannot {what}{place}: {reason}; make room or choose another folder") from error


class StateFolder:
    """The state folder of one user. Several processes may use it at once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def secret(self) -> bytes:
        """Give the edge secret, 32 bytes; made on first use."""
        path = self._folder / "edge-secret"
        with cache_errors("keep the edge secret in"), self._locked():
            if path.exists():
                secret = path.read_bytes()
                if len(secret) != SECRET_BYTES:
                    raise CacheError(
                        f"{path} should hold {SECRET_BYTES} bytes, it has {len(secret)}; move it away to make a new one"
                    )
                return secret
            secret = secrets.token_bytes(SECRET_BYTES)
            self._write(path, secret)
            return secret

    @contextlib.contextmanager
    def edit_pins(self) -> Iterator[dict[str, Any]]:
        """Give the pins to read and change; changes are kept when the block ends without an exception."""
        path = self._folder / "pins.json"
        with cache_errors("keep the pins in"), self._locked():
            pins = self._read_pins(path)
            before = json.dumps(pins, sort_keys=True)
            yield pins
            if json.dumps(pins, sort_keys=True) != before:
                self._write(path, json.dumps(pins, indent=1, sort_keys=True).encode())

    def _read_pins(self, path: Path) -> dict[str, Any]:
        if not path.exists():
            return {}
        try:
            pins = json.loads(path.read_bytes())
        except ValueError:
            pins = None
        if not isinstance(pins, dict):
            raise CacheError(f"{path} cannot be read as pins; move it away to pin every server anew")
        return pins

    def _locked(self) -> FileLock:
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return FileLock(self._folder / ".lock", mode=0o600)

    def _write(self, path: Path, content: bytes) -> None:
        write_atomically(path, content)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file with mode 0600 so that a reader sees either the old or the new content."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
