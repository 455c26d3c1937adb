"""One client, from its data file to its adapter: what `split-train client` runs."""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import signal
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from edge_client.answer import describe_noise, progress_bar
from edge_client.connector import Connector
from split_llama.errors import CacheError, ConnectionRefused, JobEnded, RemoteError, UsageError
from split_llama.lora import Adapter, write_adapter
from split_llama.wire.training import Join, Joined
from training.client.data import DataPart
from training.client.generation import Member
from training.client.jobs import JobKey, JobsClient
from training.client.link import JobLink
from training.client.loop import JobLoop
from training.client.pipeline import Compute, Pipeline
from training.client.report import Bar, LogFile, TensorBoard, Watchers, size
from training.client.setup import ClientFolder, Prepared, prepare
from training.client.state import ClientState
from training.client.waiting import QUIET_SECONDS, tell_why
from training.job_config import JobConfig
from training.settings import TrainSettings
from training.strategy import Strategy, make_strategy

T = TypeVar("T")

INTERRUPTED = 130
OVER = ("done", "failed", "cancelled")
ADAPTER_FOLDER = "adapter"


@dataclass(frozen=True, slots=True)
class ClientPlan:
    """Which job, as whom, with what data, and where results go. `quiet` shows no progress bar."""

    job: JobKey
    name: str
    data: DataPart
    out: Path
    quiet: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Ended:
    """How it ended: whether the job's last step was reached, in the server's words, and where the adapter is."""

    complete: bool
    reason: str
    adapter: Path | None


def run_client(settings: TrainSettings, plan: ClientPlan, say: Callable[[str], None]) -> int:
    """Take part in a job until it ends; gives the exit code. Raises `FlLlamaError`."""
    # A line that does not parse is told before anybody is asked anything.
    examples = plan.data.read()
    with JobsClient.of(settings) as jobs:
        status = jobs.status(plan.job)
        config = jobs.config_in(plan.job, status)
    check_strategy(settings, config)
    _check_alive(plan, str(status.get("state")))
    with ClientFolder.open(plan.out, plan.name, plan.job.id) as folder, progress_bar(quiet=plan.quiet) as progress:
        prepared = prepare(settings, config, plan.job.id, examples, say, progress)
        for line in _facts(settings, plan.data.known_task, prepared):
            say(line)
        client = Client(settings, plan, config, prepared, folder)
        with Watchers(LogFile(folder.path, say)) as watchers:
            if settings.tensorboard:
                watchers.add(TensorBoard(folder.path))
            watchers.add(_Lines(say) if plan.quiet else Bar(plan.name, config.steps))
            return asyncio.run(client.run(watchers, say))


def check_strategy(settings: TrainSettings, config: JobConfig) -> None:
    """See that a job asks for no code but what this client's user allowed. Raises `UsageError`."""
    if ":" in config.strategy and config.strategy not in settings.strategy_plugin:
        raise UsageError(
            f"the job has a strategy of its own, {config.strategy}: code that would run here. Nothing was imported. "
            f"If you have it and trust it, start the client with --strategy-plugin {config.strategy}"
        )


def _check_alive(plan: ClientPlan, state: str) -> None:
    """Tell a newcomer at once that a job is over; who took part gets what it trained. Raises `JobEnded`."""
    if state in OVER and not ClientFolder.is_of(plan.out, plan.name):
        raise JobEnded(
            f"the job is {state} and nobody can join it any more; split-train export --job {plan.job.id} fetches "
            "what all its clients shared"
        )


def _facts(settings: TrainSettings, task: str, prepared: Prepared) -> list[str]:
    data = prepared.data
    less = [f"{data.shortened} prompts shortened"] * bool(data.shortened)
    less += [f"{data.left_out} examples too long, left out"] * bool(data.left_out)
    gradient = settings.gradient_noise or settings.gradient_clip
    return [
        f"{data.samples} samples of the task {task}" + "".join(f", {each}" for each in less),
        describe_noise(prepared.edge, prepared.spec),
        *(
            [f"gradients: noise {settings.gradient_noise:g}, clip {settings.gradient_clip or 'off'}"]
            if gradient
            else []
        ),
    ]


class _Lines:
    """A watcher for a log file or a parent process: remarks only."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.note = say

    def step(self, record: object) -> None:
        """Steps are in the log file."""

    def close(self) -> None:
        """Nothing is open."""


class Client:
    """One client of one job, ready to join."""

    def __init__(
        self, settings: TrainSettings, plan: ClientPlan, config: JobConfig, prepared: Prepared, folder: ClientFolder
    ) -> None:
        self._settings = settings
        self._plan = plan
        self._config = config
        self._prepared = prepared
        self._folder = folder
        self._strategy: Strategy = make_strategy(config)
        self._loop: JobLoop | None = None
        first = prepared.maths.ends.first_weights(config.seed)
        owns = not config.shares_all or self._strategy.own_sets
        owner = f"job {plan.job.id}, client {plan.name}"
        self.state = ClientState(first, config, owns_optimizer=owns, folder=folder.path, owner=owner)

    async def run(self, watchers: Watchers, say: Callable[[str], None]) -> int:
        """Join and stay to the end; gives the exit code. Raises `FlLlamaError`."""
        async with _compute_thread() as compute:
            loop, main = asyncio.get_running_loop(), asyncio.current_task()
            assert main is not None, "this runs as a task"
            with _leaving_on_signals(loop, main):
                try:
                    ended = await self._take_part(compute, watchers)
                except asyncio.CancelledError:
                    main.uncancel()
                    say(await self._leave_for_now(compute))
                    return INTERRUPTED
        say(f"{ended.reason}; after step {self.state.step} of {self._config.steps}")
        if ended.adapter is not None:
            say(f"this client's adapter: {ended.adapter}")
            say(f"next: {self._export_command()}")
        rows = self._prepared.maths.noise.accountant.rows
        if rows:
            say(f"{rows} distinct noised rows were released")
        return 0 if ended.complete else JobEnded.exit_code

    async def _take_part(self, compute: Compute, watchers: Watchers) -> Ended:
        rows = sum(weight.numel() for weight in self.state.weights.values()) // self._prepared.width + 1
        loop: JobLoop | None = None
        link = JobLink(
            Connector.of(self._prepared.edge),
            lambda: self._join(loop.generation if loop is not None else 0, compute),
            reconnect_seconds=self._settings.reconnect_seconds,
            adapter_rows=rows,
        )
        async with link:
            self._loop = loop = JobLoop(link, lambda joined: self._member(joined, compute), watchers)
            telling = asyncio.create_task(tell_why(loop, self._config, self._ask, watchers), name="tell-why")
            try:
                reason = await loop.run()
            except JobEnded as ended:
                # It may have ended just when this client was away: then the last step's state is here.
                reason = ended.message
                await compute(lambda: self.state.restore(self.state.have()[-1], None))
            except (RemoteError, ConnectionRefused):
                raise
            except Exception:
                # A fault of this client: the others need not wait for it.
                await link.leave()
                raise
            finally:
                telling.cancel()
            adapter = await compute(self._write_adapter)
            say_bytes = f"{size(link.bytes_up)} up, {size(link.bytes_down)} down"
            return Ended(self.state.step == self._config.steps, f"{reason} ({say_bytes})", adapter)

    def _ask(self) -> Mapping[str, Any]:
        """Ask how the job stands; not for long, as somebody may want to go."""
        with JobsClient.of(self._settings, retry_seconds=0.0, patience=QUIET_SECONDS) as jobs:
            return jobs.status(self._plan.job)

    async def _join(self, generation: int, compute: Compute) -> Join:
        source = self._prepared.source
        # Behind all that is still being computed, which it may be about.
        have = await compute(self.state.have)
        return Join(
            job=self._plan.job.id,
            key=self._plan.job.key,
            client=self._plan.name,
            secret=self._folder.secret,
            blocks=(source.server_blocks.start, source.server_blocks.stop),
            geometry=source.card.geometry,
            weights=source.offer.manifest.digest,
            tokenizer=source.offer.manifest.tokenizer_digest,
            samples=self._prepared.data.samples,
            generation=generation,
            have=have,
        )

    def _member(self, joined: Joined, compute: Compute) -> tuple[Member, Pipeline]:
        prepared = self._prepared
        member = Member(joined.index, self._config, self._strategy, self.state, compute, prepared.width)
        pipeline = Pipeline(
            prepared.maths,
            prepared.data,
            compute,
            self._plan.name,
            max_micros=joined.max_micros,
            max_rows=joined.max_rows,
        )
        return member, pipeline

    async def _leave_for_now(self, compute: Compute) -> str:
        """Keep where it stands; the server waits for it. Give what to tell the user."""
        try:
            await compute(self.state.save_for_return)
            kept = f"left after step {self.state.step}"
        except CacheError as full:
            kept = f"left, but {full.message}"
        if self._loop is None or not self._loop.generation:
            return "left before the job began; its place is free until the same command, or another client, takes it"
        patience = f"{self._config.rejoin_seconds:.0f}"
        return f"{kept}. Come back with the same command; the others wait for {patience} seconds, then go on without"

    def _export_command(self) -> str:
        """Spell what makes one adapter of this client's and what all share."""
        key = ["--api-key", "KEY"] if self._settings.api_key is not None else []
        words = ["split-train", "export", "--client", str(self._folder.path), "--server", str(self._settings.server)]
        return shlex.join([*words, *key, "--job", self._plan.job.id, "--job-key", "KEY", "--out", "DIR"])

    def _write_adapter(self) -> Path | None:
        weights = {name: weight.detach().clone() for name, weight in self.state.weights.items()}
        if not weights or not self.state.step:
            return None  # The first values are no result.
        folder = self._folder.path / ADAPTER_FOLDER
        write_adapter(folder, Adapter(self._config.lora.config, weights), self._prepared.source.card.id)
        return folder


@contextlib.asynccontextmanager
async def _compute_thread() -> AsyncIterator[Compute]:
    """One thread for all of the model, for a block."""
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(1, thread_name_prefix="train-compute") as executor:

        def compute(work: Callable[[], T], /) -> asyncio.Future[T]:
            return loop.run_in_executor(executor, work)

        try:
            yield compute
        finally:
            executor.shutdown(wait=False, cancel_futures=True)


@contextlib.contextmanager
def _leaving_on_signals(loop: asyncio.AbstractEventLoop, main: asyncio.Task[Any]) -> Iterator[None]:
    """Cancel `main` on the first SIGINT or SIGTERM; the next one is as hard as ever."""
    known = (signal.SIGINT, signal.SIGTERM)

    def leave() -> None:
        for each in known:
            loop.remove_signal_handler(each)
        main.cancel()

    installed = []
    for each in known:
        # Windows has no handlers in a loop: there Ctrl-C cancels the main task by asyncio's own means.
        with contextlib.suppress(NotImplementedError):
            loop.add_signal_handler(each, leave)
            installed.append(each)
    try:
        yield
    finally:
        for each in installed:
            loop.remove_signal_handler(each)
