"""`edge-client chat`: a chat in the terminal, or line by line in a pipe."""

from __future__ import annotations

import argparse
from pathlib import Path

from edge_client.commands.loading import ask_card, load_edge
from edge_client.settings import EdgeSettings
from split_llama.settings import add_flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument(
        "--history",
        type=Path,
        metavar="FILE",
        help="keep the messages for the up key of later chats; they are stored as they are (default: not stored)",
    )
    add_flags(parser, EdgeSettings)


def run(arguments: argparse.Namespace) -> int:
    """Chat until the user leaves."""
    settings = load_edge(arguments).settings
    settings.check()
    card = ask_card(settings)
    from edge_client.terminal.run import ChatOptions, run_chat

    run_chat(settings, ChatOptions(arguments.system, arguments.history), card)
    return 0
