"""Whose request it is: callers with different keys find nothing of each other's conversations."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

# Where the guard leaves it in the ASGI scope.
OWNER = "fl_llama.owner"


def digest_of(key: str) -> bytes:
    """Hash a key. Digests have one length, and comparing them tells nothing about the key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def owner_of(scope: Mapping[str, Any]) -> str:
    """Give the owner that the guard found: the hash of the caller's key, or "" where no keys are set."""
    return str(scope.get(OWNER, ""))
