"""`split-train run`: a server and all clients on this machine, from one file to adapters in a folder."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence

from training.commands.client import say

FILE_HELP = "a TOML file, or the name of an example that comes along: demo"
SET_HELP = "change an entry, such as job.steps=200; may be given several times"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.add_argument("config", metavar="CONFIG.toml", help=FILE_HELP)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help=SET_HELP)
    parser.add_argument("--resume", action="store_true", help="go on with the run in the folder")


def run(arguments: argparse.Namespace) -> int:
    """Run to the end. Raises `FlLlamaError`."""
    from training.run import as_interrupt, run_all
    from training.run_file import RunFile

    with as_interrupt():
        file = RunFile.read(arguments.config, arguments.set)
        return run_all(file, resume=arguments.resume, say=say, again=again("run", arguments))


def again(command: str, arguments: argparse.Namespace) -> str:
    """Spell the command that goes on with what these arguments began."""
    changes = [f"--set={change}" for change in arguments.set]
    return shlex.join(["split-train", command, arguments.config, *changes, "--resume"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Raises `FlLlamaError`."""
    parser = argparse.ArgumentParser(prog="split-train run", description=__doc__, allow_abbrev=False)
    add_arguments(parser)
    return run(parser.parse_args(arguments))
