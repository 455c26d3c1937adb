"""Settings from parsed flags, for all commands alike."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any, TypeVar

from edge_client.settings import SECTION, EdgeSettings
from split_llama.settings import Loaded, load_settings

if TYPE_CHECKING:
    from edge_client.rest import ModelCard

T = TypeVar("T")


def load_edge(arguments: argparse.Namespace) -> Loaded[EdgeSettings]:
    """Merge the flags with environment, file and defaults. Raises `UsageError`."""
    return load_section(EdgeSettings, SECTION, arguments)


def ask_card(settings: EdgeSettings) -> ModelCard:
    """Ask the server for its model before torch is imported: a wrong address is told at once, not after seconds."""
    from edge_client.rest import RestClient

    rest = RestClient.of(settings)
    try:
        return rest.model_card()
    finally:
        rest.close()


def load_section(kind: type[T], section: str, arguments: argparse.Namespace) -> Loaded[T]:
    """Do the same for another settings class whose flags the command has."""
    names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    flags: dict[str, Any] = {name: value for name, value in vars(arguments).items() if name in names}
    return load_settings(kind, section, flags)
