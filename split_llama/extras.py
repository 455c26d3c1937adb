"""Packages that only some commands need: one that is missing is named together with the extra that brings it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from split_llama.errors import UsageError


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Raise `UsageError` with what to install when an import in the block finds no package."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise UsageError(
            f"the package {error.name} is not installed; this command needs: pip install 'fl-llama[{extra}]'"
        ) from error
