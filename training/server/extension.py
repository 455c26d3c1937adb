"""Split fine-tuning as an extension of `split-server`: its jobs, found again after a restart, and who joins them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from split_llama.errors import (
    FlLlamaError,
    LimitExceeded,
    PartitionNotAllowed,
    ServerUnreachable,
    UnknownJob,
    UsageError,
)
from split_llama.extension import Guest, Host, Send
from split_llama.layers import Segment
from split_llama.lora import LoraConfig
from split_llama.wire.frame import Frame
from split_llama.wire.training import Join
from training.compute.tape import Trunk
from training.job_config import JobConfig
from training.server.adapters import AdapterPlan
from training.server.budget import Budget
from training.server.engine import MakeTrunk
from training.server.job import Job, Surroundings
from training.server.keys import hash_secret, new_id, new_key
from training.server.passes import Blocks
from training.server.size import check_size
from training.server.store import JobRecord, Store
from training.server.tally import Meters
from training.strategy import make_strategy

MAX_LIVE_JOBS = 64
MAX_LIVE_JOBS_OF_ONE = 16
RETRY_LOADING_MS = 500
# The owner of everything on a server without API keys: nobody in particular.
ANONYMOUS = "anonymous"

log = logging.getLogger("fl_llama.training")


def make_trunk(segment: Segment, lora: LoraConfig | None) -> Blocks:
    """Make what computes a job's blocks."""
    return Trunk(segment, lora)


class TrainingExtension:
    """The extension: jobs by their ids."""

    name = "training"

    def __init__(
        self,
        host: Host,
        *,
        make_trunk: MakeTrunk = make_trunk,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.host = host
        self.budget = Budget(lambda: host.memory_bytes)
        self._around = Surroundings(host, self.budget, Meters(host), make_trunk, clock)
        self._jobs: dict[str, Job] = {}
        self._started = False
        self._loaded = False
        self._closing = False
        self._add_gauges()

    def _add_gauges(self) -> None:
        host = self.host
        host.gauge("training_held_bytes", "Bytes held for backward passes to come", lambda: self.budget.held)
        host.gauge(
            "training_activation_bytes",
            "These, and states and gradients of clients that wait",
            lambda: sum(job.activation_bytes for job in self.jobs),
        )
        for state in ("waiting", "running", "paused", "done", "failed", "cancelled"):
            host.gauge(f"training_jobs_{state}", f"Fine-tuning jobs that are {state}", self._counting(state))

    def _counting(self, state: str) -> Callable[[], float]:
        return lambda: sum(job.state == state for job in self.jobs)

    @property
    def jobs(self) -> list[Job]:
        """All jobs that have been read so far, the oldest first."""
        return list(self._jobs.values())

    def of_owner(self, owner: str) -> list[Job]:
        """One owner's jobs, the oldest first. Raises `ServerUnreachable` while jobs are being read."""
        self._check_loaded()
        return [job for job in self.jobs if job.record.owner == owner]

    def router(self) -> Any:
        """Give the REST routes."""
        from training.server.routes import make_router

        return make_router(self)

    def find(self, ident: str) -> Job:
        """Look a job up. Raises `UnknownJob`, and `ServerUnreachable` while model and jobs are being loaded."""
        job = self._jobs.get(ident)
        if job is None:
            self._check_loaded()
            raise UnknownJob(f"there is no fine-tuning job {ident[:64]!r} on this server; GET /v1/jobs lists your own")
        return job

    def _check_loaded(self) -> None:
        _ = self.host.checkpoint  # Until the model is there, neither are the jobs.
        if not self._loaded:
            raise ServerUnreachable("the server is still reading its jobs", retry_after_ms=RETRY_LOADING_MS)

    async def create(self, raw: Mapping[str, Any], owner: str) -> tuple[Job, str]:
        """Make a job of a configuration; give it and its key. Raises `FlLlamaError`."""
        self._check_loaded()
        host, config = self.host, JobConfig.parse(raw)
        self._check(config)
        self._check_count(owner)
        key, ident = new_key(), new_id()
        geometry = host.checkpoint.config.geometry_digest()
        record = JobRecord(ident, owner, hash_secret(key), config, geometry, time.time())
        store = Store(host.folder)
        folder = await host.in_background(lambda: store.open(ident))
        job = Job(record, folder, self._around)
        content = record.to_json()
        await host.in_background(lambda: folder.write(content))
        self._jobs[ident] = job
        job.start()
        log.info("job created id=%s strategy=%s clients=%d", ident, config.strategy, config.clients)
        return job, key

    def _check(self, config: JobConfig) -> None:
        plan = AdapterPlan.of(self.host.checkpoint.config, config)
        if not self.host.blocks.contains(plan.blocks):
            raise PartitionNotAllowed(
                f"partition {config.partition} leaves blocks {plan.blocks} to the server; it hosts {self.host.blocks}"
            )
        check_size(config, plan, self.budget.limit)
        self._check_plugin(config)
        make_strategy(config)

    def _check_plugin(self, config: JobConfig) -> None:
        if ":" in config.strategy and config.strategy not in self.host.plugins:
            raise UsageError(
                f"the strategy {config.strategy!r} would run code on the server: its operator can allow it with "
                f"--extension-plugin {config.strategy}"
            )

    def _check_count(self, owner: str) -> None:
        live = [job for job in self.jobs if job.record.ended is None]
        if len(live) >= MAX_LIVE_JOBS:
            raise LimitExceeded(f"{MAX_LIVE_JOBS} fine-tuning jobs are under way; wait for one, or cancel one")
        own = sum(job.record.owner == owner for job in live)
        if owner != ANONYMOUS and own >= MAX_LIVE_JOBS_OF_ONE:
            raise LimitExceeded(f"{own} fine-tuning jobs of yours are under way; wait for one, or cancel one")

    async def remove(self, job: Job) -> None:
        """Forget a job that has ended, with all its files. Raises `CacheError`."""
        await job.over()
        store = Store(self.host.folder)
        await self.host.in_background(lambda: store.remove(job.record.id))
        self._jobs.pop(job.record.id, None)
        log.info("job removed id=%s", job.record.id)

    def join(self, frame: Frame, owner: str, send: Send) -> Guest:
        """Take a JOIN in: whoever has a job's key. Raises `UnknownJob`, `NotOwner`, `JobEnded` and more."""
        request = Join.from_bytes(frame.payload)
        return self.find(request.job).join(frame.seq, request, send)

    async def start(self) -> None:
        """The model is there: take up the jobs that were under way."""
        if self._started:
            return
        self._started = True
        store = Store(self.host.folder)
        geometry = self.host.checkpoint.config.geometry_digest()
        for record in await self.host.in_background(store.load):
            if self._closing:
                return
            if record.geometry != geometry:
                log.error("job left out: it is of another model id=%s", record.id)
            else:
                await self._take_up(store, record)
        self._loaded = True

    async def _take_up(self, store: Store, record: JobRecord) -> None:
        try:
            # What was allowed once need not be any more.
            self._check_plugin(record.config)
            folder = await self.host.in_background(lambda: store.open(record.id))
            job = Job(record, folder, self._around)
        except FlLlamaError as error:
            log.error("job left out id=%s: %s", record.id, error.message)
            return
        self._jobs[record.id] = job
        if not self._closing:
            job.start()

    async def close(self) -> None:
        """The server ends: every job stops in order and goes on when the server is back."""
        self._closing = True
        await asyncio.gather(*(job.close() for job in self.jobs))
