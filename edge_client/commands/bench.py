"""`edge-client bench`: where the time of a token goes."""

from __future__ import annotations

import argparse

from edge_client.commands.loading import ask_card, load_edge
from edge_client.settings import EdgeSettings
from split_llama.errors import UsageError
from split_llama.settings import add_flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.add_argument("--prompt-tokens", type=int, default=64, metavar="N", help="length of the prompt (default: 64)")
    parser.add_argument("--new-tokens", type=int, default=128, metavar="N", help="length of an answer (default: 128)")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="answers of each kind (default: 3)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--quiet", action="store_true", help="nothing on stderr but errors")
    add_flags(parser, EdgeSettings)


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; the report goes to stdout."""
    settings = load_edge(arguments).settings
    settings.check()
    for name, least in (("prompt_tokens", 1), ("new_tokens", 2), ("repeats", 1)):
        if getattr(arguments, name) < least:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: expected {least} or more")
    card = ask_card(settings)
    from edge_client.planning.bench import BenchPlan
    from edge_client.planning.run_bench import bench

    plan = BenchPlan(arguments.prompt_tokens, arguments.new_tokens, arguments.repeats)
    bench(settings, plan, card, as_json=arguments.json, quiet=arguments.quiet)
    return 0
