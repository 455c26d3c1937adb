"""`split-train client`: one client of a job, with data of its own."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from edge_client.printable import printable
from split_llama.errors import UsageError
from split_llama.settings import add_flags, load_settings
from training.settings import SECTION, TrainSettings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    add = parser.add_argument
    add("--job", required=True, metavar="ID", help="the job, as its creator was told")
    add("--name", required=True, metavar="NAME", help="who this is among the job's clients; another name is another")
    add("--task", default="auto", metavar="NAME", help="multirc, coqa, pairs, chat, text ...; auto looks at the file")
    add("--data", type=Path, metavar="FILE", help="the examples to learn; --task demo makes its own")
    add(
        "--share", default="0/1", metavar="I/N", help="take share I (from 0) of N of the data, the same dealing for all"
    )
    add("--deal", default="iid", metavar="HOW", help="how --share deals: iid, dirichlet:ALPHA or shards:N")
    add("--deal-seed", type=int, default=0, metavar="N", help="seed of the dealing (default: 0)")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for DIR/client-NAME: checkpoints, adapter, logs")
    add("--quiet", action="store_true", help="no progress bar")
    add_flags(parser, TrainSettings)


def run(arguments: argparse.Namespace) -> int:
    """Take part until the job ends. Raises `FlLlamaError`."""
    names = {field.name for field in dataclasses.fields(TrainSettings)}
    flags = {name: value for name, value in vars(arguments).items() if name in names}
    settings = load_settings(TrainSettings, SECTION, flags).settings
    if settings.job_key is None:
        raise UsageError("the job's creator was given a key for it: give it with --job-key KEY")
    settings.edge("1,1", "fp32").server_url()
    from training.client.data import DataPart
    from training.client.jobs import JobKey
    from training.client.run import ClientPlan, run_client

    share = DataPart.parse_share(arguments.share)
    data = DataPart(arguments.task, arguments.data, *share, how=arguments.deal, seed=arguments.deal_seed)
    job = JobKey(arguments.job, settings.job_key)
    return run_client(settings, ClientPlan(job, arguments.name, data, arguments.out, arguments.quiet), say)


def say(line: str) -> None:
    """Write a line to stderr."""
    sys.stderr.write(printable(line) + "\n")
    sys.stderr.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Raises `FlLlamaError`."""
    parser = argparse.ArgumentParser(prog="split-train client", description=__doc__, allow_abbrev=False)
    add_arguments(parser)
    return run(parser.parse_args(arguments))
