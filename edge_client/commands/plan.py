"""`edge-client plan`: how to run best on this device, over this link, with this server."""

from __future__ import annotations

import argparse
import math

from edge_client.commands.loading import ask_card, load_edge
from edge_client.settings import EdgeSettings
from split_llama.errors import UsageError
from split_llama.settings import add_flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.add_argument(
        "--target-rtt",
        type=float,
        action="append",
        default=[],
        metavar="MS",
        help="foretell also for a round trip of MS milliseconds; may be given several times",
    )
    parser.add_argument("--prompt-tokens", type=int, default=64, metavar="N", help="length of a prompt (default: 64)")
    parser.add_argument(
        "--answer-tokens", type=int, default=128, metavar="N", help="length of an answer (default: 128)"
    )
    drafts = parser.add_mutually_exclusive_group()
    drafts.add_argument(
        "--acceptance",
        type=float,
        metavar="SHARE",
        help="assume that so many guesses are right where all before them were (default: 0.5)",
    )
    drafts.add_argument(
        "--measure-drafts", action="store_true", help="measure that instead, with a real answer to a public prompt"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--quiet", action="store_true", help="nothing on stderr but errors")
    add_flags(parser, EdgeSettings)


def run(arguments: argparse.Namespace) -> int:
    """Measure, print what to do, and keep the partition for `--partition auto`."""
    settings = load_edge(arguments).settings
    settings.check()
    _check(arguments)
    card = ask_card(settings)
    from edge_client.planning.run_plan import PlanRequest, plan

    request = PlanRequest(
        prompt_tokens=arguments.prompt_tokens,
        answer_tokens=arguments.answer_tokens,
        target_rtts_ms=tuple(arguments.target_rtt),
        acceptance=arguments.acceptance,
        measure_drafts=arguments.measure_drafts,
    )
    plan(settings, request, card, as_json=arguments.json, quiet=arguments.quiet)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    for name in ("prompt_tokens", "answer_tokens"):
        if getattr(arguments, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: expected 1 or more")
    for milliseconds in arguments.target_rtt:
        if not 0 <= milliseconds < math.inf:
            raise UsageError(f"--target-rtt {milliseconds}: expected milliseconds, 0 or more")
    if arguments.acceptance is not None and not 0 <= arguments.acceptance <= 1:
        raise UsageError(f"--acceptance {arguments.acceptance}: expected a share from 0 to 1")
