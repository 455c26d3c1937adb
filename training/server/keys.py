"""Keys of jobs and secrets of clients: drawn with 256 random bits, kept as SHA-256 alone."""

from __future__ import annotations

import hashlib
import secrets

KEY_PREFIX = "flj-"


def new_key() -> str:
    """Draw a job's key."""
    return KEY_PREFIX + secrets.token_urlsafe(32)


def new_id() -> str:
    """Draw a job's id."""
    return "job-" + secrets.token_hex(8)


def hash_secret(secret: str) -> str:
    """Give the SHA-256 of a key or secret in hex; there is nothing to guess that a slow hash could slow down."""
    return hashlib.sha256(secret.encode()).hexdigest()
