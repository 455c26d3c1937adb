"""`edge-client config`: each setting and where it came from."""

from __future__ import annotations

import argparse
import sys

from edge_client.commands.loading import load_edge
from edge_client.settings import EdgeSettings
from split_llama.settings import add_flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    add_flags(parser, EdgeSettings)


def run(arguments: argparse.Namespace) -> int:
    """Print the settings as a table."""
    rows = load_edge(arguments).rows()
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for name, value, origin in rows:
        sys.stdout.write(f"{name:<{widths[0]}}  {value:<{widths[1]}}  {origin}\n")
    return 0
