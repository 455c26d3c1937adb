"""`edge-client doctor`: what stands between this machine and an answer, in plain words."""

from __future__ import annotations

import argparse
import json
import sys

from edge_client.commands.loading import load_edge
from edge_client.settings import EdgeSettings
from split_llama.errors import ServerUnreachable, UsageError
from split_llama.settings import add_flags

NOT_USABLE = ServerUnreachable.exit_code


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    parser.add_argument("--pings", type=int, default=10, metavar="N", help="round trips to time (default: 10)")
    add_flags(parser, EdgeSettings)


def run(arguments: argparse.Namespace) -> int:
    """Look at everything; 0 when it will do, 3 when not."""
    settings = load_edge(arguments).settings
    settings.check()
    if not 1 <= arguments.pings <= 1000:
        raise UsageError(f"--pings {arguments.pings}: expected 1 to 1000")
    from edge_client.doctor.examine import examine, not_checked
    from edge_client.doctor.finding import usable
    from edge_client.doctor.report import as_json, as_text, verdict

    findings = []
    for finding in examine(settings, pings=arguments.pings):
        findings.append(finding)
        if not arguments.json:
            sys.stdout.write(as_text(finding) + "\n")
            sys.stdout.flush()
    missed = not_checked(findings)
    sys.stdout.write(json.dumps(as_json(findings, missed), indent=2) if arguments.json else verdict(findings, missed))
    sys.stdout.write("\n")
    return 0 if usable(findings) else NOT_USABLE
