"""The command `edge-client`. Text goes to stdout as it is generated, everything else to stderr.

Exit codes: 0 done, 2 wrong usage, 3 the server refused or cannot be reached, 4 the model is unusable, 130 interrupted.
Heavy modules are imported by the commands, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
from collections.abc import Sequence

from edge_client.settings import SECTION, EdgeSettings
from split_llama.errors import FlLlamaError, Unauthenticated, UsageError
from split_llama.settings import Loaded, add_flags, load_settings

INTERRUPTED = 130
BROKEN_PIPE = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; give the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        loaded = _load(arguments)
        if arguments.command == "config":
            _print_config(loaded)
            return 0
        return _generate(loaded.settings, arguments)
    except FlLlamaError as error:
        advice = "; here that is --api-key KEY" if isinstance(error, Unauthenticated) else ""
        print(f"edge-client: {error.message}{advice}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read stdout is gone; flushing at exit would complain again.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE


def _generate(settings: EdgeSettings, arguments: argparse.Namespace) -> int:
    settings.check()
    if arguments.system is not None and not arguments.chat:
        raise UsageError("--system needs --chat")
    from edge_client.rest import RestClient

    # Asked before torch is imported: a wrong address is told at once, not after seconds.
    rest = RestClient(settings.server_url(), settings.api_key, retry_seconds=settings.reconnect_seconds)
    card = rest.model_card()
    rest.close()
    from edge_client.commands import Request, generate

    request = Request(
        prompt=arguments.prompt,
        chat=arguments.chat,
        system=arguments.system,
        as_json=arguments.json,
        quiet=arguments.quiet,
    )
    generate(settings, request, card)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="edge-client",
        description="Generate text through a split model: the text, the first and the last blocks stay here.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    generate = commands.add_parser("generate", help="generate text from a prompt", allow_abbrev=False)
    generate.add_argument("--prompt", required=True, metavar="TEXT|-", help="the prompt; - reads it from stdin")
    generate.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    generate.add_argument("--system", metavar="TEXT", help="system message, with --chat")
    generate.add_argument("--json", action="store_true", help="print one JSON object at the end instead of text")
    generate.add_argument("--quiet", action="store_true", help="nothing on stderr but errors")
    add_flags(generate, EdgeSettings)
    config = commands.add_parser("config", help="show each setting and where it came from", allow_abbrev=False)
    add_flags(config, EdgeSettings)
    return parser


def _load(arguments: argparse.Namespace) -> Loaded[EdgeSettings]:
    names = {field.name for field in dataclasses.fields(EdgeSettings)}
    flags = {name: value for name, value in vars(arguments).items() if name in names}
    return load_settings(EdgeSettings, SECTION, flags)


def _print_config(loaded: Loaded[EdgeSettings]) -> None:
    rows = loaded.rows()
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for name, value, origin in rows:
        print(f"{name:<{widths[0]}}  {value:<{widths[1]}}  {origin}")
