"""Settings from parsed flags, for all commands alike."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any, TypeVar

from edge_client.settings import SECTION, EdgeSettings
from split_llama.settings import Loaded, load_settings

T = TypeVar("T")


def load_edge(arguments: argparse.Namespace) -> Loaded[EdgeSettings]:
    """Merge the flags with environment, file and defaults. Raises `UsageError`."""
    return load_section(EdgeSettings, SECTION, arguments)


def load_section(kind: type[T], section: str, arguments: argparse.Namespace) -> Loaded[T]:
    """Do the same for another settings class whose flags the command has."""
    names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    flags: dict[str, Any] = {name: value for name, value in vars(arguments).items() if name in names}
    return load_settings(kind, section, flags)
