"""`edge-client generate`: one answer to one prompt."""

from __future__ import annotations

import argparse

from edge_client.commands.loading import ask_card, load_edge
from edge_client.settings import EdgeSettings
from split_llama.errors import UsageError
from split_llama.settings import add_flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.add_argument("--prompt", required=True, metavar="TEXT|-", help="the prompt; - reads it from stdin")
    parser.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    parser.add_argument("--system", metavar="TEXT", help="system message, with --chat")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end instead of text")
    parser.add_argument("--quiet", action="store_true", help="nothing on stderr but errors")
    add_flags(parser, EdgeSettings)


def run(arguments: argparse.Namespace) -> int:
    """Generate; text goes to stdout as it comes."""
    settings = load_edge(arguments).settings
    settings.check()
    if arguments.system is not None and not arguments.chat:
        raise UsageError("--system needs --chat")
    card = ask_card(settings)
    from edge_client.answer import Request, generate

    request = Request(
        prompt=arguments.prompt,
        chat=arguments.chat,
        system=arguments.system,
        as_json=arguments.json,
        quiet=arguments.quiet,
    )
    generate(settings, request, card)
    return 0
