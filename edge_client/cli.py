"""The command `edge-client`. Text goes to stdout as it is generated, everything else to stderr.

Exit codes: 0 done, 2 wrong usage, 3 the server refused or cannot be reached, 4 the model is unusable, 130 interrupted.
Only the module of the command that runs is imported, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Sequence

from edge_client.printable import printable
from split_llama.errors import FlLlamaError, Unauthenticated

INTERRUPTED = 130
BROKEN_PIPE = 141
# What each command does; `edge_client.commands` has a module of its name, with `_` for `-`.
COMMANDS = {
    "generate": "generate text from a prompt",
    "chat": "chat in the terminal",
    "serve": "serve OpenAI's API and a chat page on this machine",
    "bench": "measure where the time of a token goes",
    "plan": "measure device, link and server, and say how to run best",
    "train-drafter": "train a draft head for the model of a server",
    "doctor": "look at network, server and machine, and say what is wrong",
    "config": "show each setting and where it came from",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; give the exit code."""
    words = sys.argv[1:] if argv is None else argv
    arguments = _parser(words).parse_args(words)
    try:
        code: int = arguments.run(arguments)
    except FlLlamaError as error:
        advice = "; here that is --api-key KEY" if isinstance(error, Unauthenticated) else ""
        print(printable(f"edge-client: {error.message}{advice}"), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read stdout is gone; flushing at exit would complain again.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    return code


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="edge-client",
        description="Generate text through a split model: the text, the first and the last blocks stay here.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, purpose in COMMANDS.items():
        subparser = commands.add_parser(name, help=purpose, description=purpose, allow_abbrev=False)
        if name in words:
            module = importlib.import_module(f"edge_client.commands.{name.replace('-', '_')}")
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    return parser
