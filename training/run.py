"""A whole fine-tuning run on this machine: a server, its job, clients in processes of their own, and what they leave.

The folder of a run: `job.json` (the job and its model), `server/` (the server's checkpoints), `client-NAME/`,
`shared.safetensors` (what the server holds at the end), `summary.json`, and the logs of all processes.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from filelock import FileLock, Timeout

from edge_client.state_files import cache_errors, write_atomically
from split_llama.errors import FlLlamaError, ServerUnreachable, UsageError
from split_llama.json_file import read_json
from training.client.data import DataPart
from training.client.jobs import JobKey, JobsClient
from training.display import Display
from training.processes import Child, Children
from training.results import DONE, finish, finished, what_next
from training.run_file import RunFile, as_flags
from training.settings import TrainSettings
from training.site import JOB_FILE as JOB_FILE
from training.site import KEY_FILE, Site, own_settings
from training.site import SHARED_FILE as SHARED_FILE

READY_SECONDS = 600.0
POLL_SECONDS = 0.2
STATUS_SECONDS = 2.0
OVER = ("done", "failed", "cancelled")
EXIT_INTERRUPTED = 130

Say = Callable[[str], None]


def run_all(file: RunFile, *, resume: bool, say: Say, again: str) -> int:
    """Run server and clients to the end of the job; gives the exit code. Raises `FlLlamaError`.

    `again` is the command that goes on with an interrupted run.
    """
    _check_data(file)
    check_folder(file, resume)
    if resume and (known := finished(file)) is not None:
        say(f"the run in {file.out} is done already; choose another folder by --set out=DIR for a new one")
        for line in what_next(Site(file, "", known_job(file)), known):
            say(line)
        return 0
    began = time.monotonic()
    with own_folder(file.out), Children() as children:
        site = start_site(file, children, say, resume=resume)
        say(f"job {site.job.id}: {file.job.strategy}, {file.job.clients} clients, {file.job.steps} steps -> {file.out}")
        clients = {f"client-{site.client_name(index)}": index for index in range(file.job.clients)}
        with Display({name: site.client_folder(index) for name, index in clients.items()}, file.job.steps) as display:
            try:
                running = [_start_client(site, children, name, index) for name, index in clients.items()]
                _watch(children.started("server"), running, display)
            except KeyboardInterrupt:
                display.say(f"interrupted; go on with: {again} (it is all in {file.out})")
                return EXIT_INTERRUPTED
        summary = finish(site, display, time.monotonic() - began)
    for line in what_next(site, summary):
        say(line)
    return 0 if summary["state"] == DONE else FlLlamaError.exit_code


def start_site(file: RunFile, children: Children, say: Say, *, resume: bool) -> Site:
    """Start the server and create the job, or come back to it. Raises `FlLlamaError`."""
    known = known_job(file) if resume else None
    port = int(file.server.get("port", 0)) or free_port()
    flags = {**file.server, "port": port, "extension_dir": file.server.get("extension_dir", file.out / "server")}
    server = children.start("server", "serving.cli", as_flags(flags), file.out / "server.log")
    host = str(file.server.get("host", "127.0.0.1"))
    url = f"http://{'127.0.0.1' if host in ('0.0.0.0', '::') else host}:{port}"
    say(f"starting split-server {file.server['model']} at {url}")
    _wait_ready(server, url)
    return Site(file, url, known or new_job(file, own_settings(file, url)))


@contextmanager
def own_folder(out: Path) -> Iterator[None]:
    """Have a run's folder to oneself for a block. Raises `UsageError` when another process is at work in it."""
    with cache_errors("make the run's folder"):
        out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UsageError(
            f"another run is at work in {out}; end it, or choose another folder by --set out=DIR"
        ) from None
    try:
        yield
    finally:
        lock.release()


def new_job(file: RunFile, settings: TrainSettings) -> JobKey:
    """Create the job, and note it in the folder. Raises `FlLlamaError`."""
    with JobsClient.of(settings) as jobs:
        job = jobs.create(file.job)
    facts = {"job": job.id, "model": str(file.server["model"]), "config": file.job.model_dump(mode="json")}
    with cache_errors("write the run's folder"):
        file.out.mkdir(parents=True, exist_ok=True)
        write_atomically(file.out / KEY_FILE, job.key.encode())
        write_atomically(file.out / JOB_FILE, json.dumps(facts, indent=1).encode())
    return job


def wait_for_job(site: Site, server: Child | None, say: Say) -> str:
    """Wait until the job is over, saying now and then how it stands; gives its last state. Raises `FlLlamaError`."""
    shown: tuple[object, ...] = ()
    with JobsClient.of(site.settings()) as jobs:
        while True:
            if server is not None and server.code is not None:
                raise ServerUnreachable(f"the server ended (exit code {server.code}):\n{server.last_words()}")
            status = jobs.status(site.job)
            members = [member.get("name") for member in status.get("members", ()) if member.get("present")]
            now = (status.get("state"), status.get("step"), tuple(members))
            if now != shown:
                loss = status.get("loss")
                words = f", loss {loss:.4f}" if isinstance(loss, float) else ""
                say(f"{now[0]}: step {now[1]} of {site.file.job.steps}{words}, here: {', '.join(members) or 'nobody'}")
                shown = now
            if status.get("state") in OVER:
                return str(status["state"])
            time.sleep(STATUS_SECONDS)


def free_port() -> int:
    """Find a loopback port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _check_data(file: RunFile) -> None:
    """Read all data once: a wrong line is told before anything is started."""
    data, job = file.data, file.job
    if len(data.train) > 1:
        for path in data.train:
            DataPart(data.task, path).read()
    else:
        only = data.train[0] if data.train else None
        DataPart(data.task, only, 0, job.clients, data.partition, job.seed).read()


def check_folder(file: RunFile, resume: bool) -> None:
    """See that a run can begin, or go on, in its folder. Raises `UsageError`."""
    there = (file.out / JOB_FILE).is_file()
    if there and not resume:
        raise UsageError(
            f"{file.out} holds a run already: go on with it by --resume, or choose another folder by --set out=DIR"
        )
    if resume and not there:
        raise UsageError(f"there is no run in {file.out} to go on with; leave --resume out")


def known_job(file: RunFile) -> JobKey:
    """Give the job of the run in the file's folder. Raises `UsageError` where it is another, or not there."""
    facts = read_json(file.out / JOB_FILE)
    if changed := _differences(facts.get("config"), file.job.model_dump(mode="json")):
        raise UsageError(
            f"the run in {file.out} has another [job] than this file: {'; '.join(changed)}. Give its own file and "
            "every --set of then, or another out"
        )
    try:
        return JobKey(str(facts["job"]), (file.out / KEY_FILE).read_text(encoding="utf-8"))
    except (KeyError, OSError) as error:
        raise UsageError(
            f"the run in {file.out} cannot be gone on with: its job or key is not there ({error})"
        ) from None


def _differences(was: Any, now: Any, name: str = "job") -> list[str]:
    """Name the entries in which two configurations differ."""
    if not isinstance(was, dict) or not isinstance(now, dict):
        return [] if was == now else [f"{name} was {was!r}, is {now!r}"]
    return [each for key in {**was, **now} for each in _differences(was.get(key), now.get(key), f"{name}.{key}")]


def _wait_ready(server: Child, url: str) -> None:
    deadline = time.monotonic() + READY_SECONDS
    with httpx.Client(trust_env=False, timeout=5.0) as client:
        while time.monotonic() < deadline:
            if server.code is not None:
                raise UsageError(_why_ended(server))
            try:
                if client.get(f"{url}/readyz").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(POLL_SECONDS)
    raise ServerUnreachable(f"split-server was not ready within {READY_SECONDS:.0f} seconds:\n{server.last_words()}")


def _why_ended(server: Child) -> str:
    words = server.last_words()
    if server.code == UsageError.exit_code and (refusal := re.search(r"split-server: error: (.+)\Z", words)):
        # The flags are known to split-server alone; its help would hide what is wrong.
        return f"split-server does not take the section [server]: {refusal[1]} (split-server --help lists its flags)"
    return f"split-server ended (exit code {server.code}):\n{words}"


def _start_client(site: Site, children: Children, name: str, index: int) -> Child:
    threads = [] if "threads" in site.file.client else [f"--threads={_threads(site.file.job.clients)}"]
    keys = {"FL_LLAMA_TRAIN_JOB_KEY": site.job.key}
    if (api_key := site.settings().api_key) is not None:
        keys["FL_LLAMA_TRAIN_API_KEY"] = api_key
    words = [*site.client_command(index), "--quiet", *threads]
    return children.start(name, "training.cli", words, site.client_folder(index) / "client.log", keys)


def _threads(clients: int) -> int:
    return max(1, (os.cpu_count() or 2) // 2 // (clients + 1))


def _watch(server: Child, clients: Sequence[Child], display: Display) -> None:
    """Wait until all clients are done. Raises `FlLlamaError` with the end of its log as soon as a process fails."""
    while True:
        display.update()
        for child in (server, *clients):
            if child.code is not None and (child.code or child is server):
                raise FlLlamaError(
                    f"{child.name} ended early (exit code {child.code}), so all were ended; its log {child.log} ends "
                    f"with\n{child.last_words()}\ngo on with --resume once that is mended"
                )
        if all(child.code == 0 for child in clients):
            return
        time.sleep(POLL_SECONDS)


@contextmanager
def as_interrupt() -> Iterator[None]:
    """Treat SIGTERM as Ctrl-C in a block, so that nothing started is left behind."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
