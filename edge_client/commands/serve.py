"""`edge-client serve`: OpenAI's API, a chat page and a WebSocket chat for everybody on this machine."""

from __future__ import annotations

import argparse

from edge_client.commands.loading import ask_card, load_edge, load_section
from edge_client.gateway.settings import SECTION, GatewaySettings
from edge_client.settings import EdgeSettings
from split_llama.extras import needs_extra
from split_llama.settings import add_flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags: the gateway's own, then the edge's."""
    add_flags(parser, GatewaySettings)
    add_flags(parser, EdgeSettings)


def run(arguments: argparse.Namespace) -> int:
    """Serve until the process is told to end."""
    settings = load_edge(arguments).settings
    settings.check()
    gateway = load_section(GatewaySettings, SECTION, arguments).settings
    gateway.check()
    card = ask_card(settings)
    with needs_extra("gateway"):
        from edge_client.gateway.run import run as serve

    return serve(settings, gateway, card)
