"""`split-train server`: make a job for clients elsewhere, with a server that is started here or on a running one."""

from __future__ import annotations

import argparse
import shlex
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from training.commands.client import say
from training.commands.run import FILE_HELP, SET_HELP, again

if TYPE_CHECKING:
    from training.run_file import RunFile
    from training.site import Site


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.add_argument("config", metavar="CONFIG.toml", help=f"{FILE_HELP}; [data] and [client] are for run alone")
    parser.add_argument("--server", metavar="URL", help="create the job on this running server, and end")
    parser.add_argument("--api-key", metavar="KEY", help="key for that server")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help=SET_HELP)
    parser.add_argument("--resume", action="store_true", help="go on with the job in the folder")


def run(arguments: argparse.Namespace) -> int:
    """Create the job; with a server of its own, stay until the job is over. Raises `FlLlamaError`."""
    from training.run import as_interrupt
    from training.run_file import RunFile

    file = RunFile.read(arguments.config, arguments.set, required=())
    if arguments.server is not None:
        return _on_running_server(file, arguments)
    with as_interrupt():
        return _with_server(file, arguments)


def _on_running_server(file: RunFile, arguments: argparse.Namespace) -> int:
    from split_llama.settings import load_settings
    from training.client.jobs import JobsClient
    from training.settings import SECTION, TrainSettings
    from training.site import Site

    flags = {"server": arguments.server, "api_key": arguments.api_key}
    settings = load_settings(TrainSettings, SECTION, flags).settings
    with JobsClient.of(settings, retry_seconds=0.0) as jobs:
        job = jobs.create(file.job)
    _announce(Site(file, arguments.server, job), asks_for_key=settings.api_key is not None)
    return 0


def _with_server(file: RunFile, arguments: argparse.Namespace) -> int:
    from split_llama.errors import FlLlamaError
    from training.processes import Children
    from training.results import finish
    from training.run import EXIT_INTERRUPTED, check_folder, own_folder, start_site, wait_for_job

    resume = arguments.resume
    check_folder(file, resume)
    began = time.monotonic()
    with own_folder(file.out), Children() as children:
        try:
            site = start_site(file, children, say, resume=resume)
            _announce(site, asks_for_key=bool({"api_key", "api_key_file"} & file.server.keys()))
            state = wait_for_job(site, children.started("server"), say)
        except KeyboardInterrupt:
            say(f"interrupted; go on with: {again('server', arguments)} (the job is in {file.out})")
            return EXIT_INTERRUPTED
        finish(site, None, time.monotonic() - began)
    say(f"{state}; the adapter that all share is in {file.out}")
    return 0 if state == "done" else FlLlamaError.exit_code


def _announce(site: Site, *, asks_for_key: bool) -> None:
    """Say how to take part."""
    say(f"job {site.job.id}, key {site.job.key} (it is shown once); {site.file.job.clients} clients start it with")
    words = ["split-train", "client", "--server", site.url, "--job", site.job.id, "--job-key", site.job.key]
    words += ["--api-key", "KEY"] if asks_for_key else []
    task = site.file.data.task
    words += ["--name", "NAME", "--task", task, *([] if task == "demo" else ["--data", "FILE"]), "--out", "DIR"]
    if ":" in (strategy := site.file.job.strategy):
        words += ["--strategy-plugin", strategy]
    say("  " + " ".join(word if word.isupper() else shlex.quote(word) for word in words))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Raises `FlLlamaError`."""
    parser = argparse.ArgumentParser(prog="split-train server", description=__doc__, allow_abbrev=False)
    add_arguments(parser)
    return run(parser.parse_args(arguments))
