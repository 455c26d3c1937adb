"""The command `split-loadtest`. The report goes to stdout, everything else to stderr.

Exit codes: 0 all answered and the counters agree, 1 requests failed or the counters disagree, 2 wrong usage, 3 the
server refused or cannot be reached, 4 the model is unusable, 130 interrupted (the report of what ran is printed).
Heavy modules are imported by the commands, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from loadtest import proxy_command
from loadtest.settings import SECTION, LoadSettings
from split_llama.errors import FlLlamaError, UsageError
from split_llama.extras import needs_extra
from split_llama.settings import add_flags, load_settings

INTERRUPTED = 130
DESCRIPTION = (
    "Concurrent clients in a closed loop: each sends its next request when its last answer ended, so a slow server "
    "slows the load down too. Measures, serves Prometheus metrics while it runs, and compares the server's counters "
    "with its own."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; give the exit code."""
    arguments = vars(_parser().parse_args(argv))
    command = arguments.pop("command")
    try:
        if command == "report":
            return _report(arguments["file"])
        if command == "proxy":
            return proxy_command.run(argparse.Namespace(**arguments))
        settings = load_settings(LoadSettings, SECTION, arguments).settings
        settings.validate()
        with needs_extra("loadtest"):
            from loadtest.command import run

        return run(settings)
    except FlLlamaError as error:
        print(f"split-loadtest: {error.message}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="split-loadtest", description=DESCRIPTION, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser(
        "run",
        help="put load on a server and report",
        description=DESCRIPTION,
        epilog="Each flag can also be set as FL_LLAMA_LOADTEST_NAME or in ~/.config/fl-llama/config.toml, [loadtest].",
        allow_abbrev=False,
    )
    add_flags(run, LoadSettings)
    report = commands.add_parser("report", help="print the table of a report that --json wrote", allow_abbrev=False)
    report.add_argument("file", type=Path, metavar="FILE")
    proxy_command.add_arguments(
        commands.add_parser(
            "proxy", help="emulate a slow or broken link", description=proxy_command.DESCRIPTION, allow_abbrev=False
        )
    )
    return parser


def _report(file: Path) -> int:
    from loadtest.report import render

    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be read as a report: {error}") from error
    print(render(document))
    return 0
