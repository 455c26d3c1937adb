"""What a job leaves on the disk while it goes on: checkpoints, job.json, and its adapters at the end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

from torch import Tensor

from split_llama.errors import AdapterMismatch, CacheError
from split_llama.extension import Host
from training.roster import KEPT_CHECKPOINTS
from training.server.adapters import AdapterPlan
from training.server.clock import JobClock
from training.server.engine import Engine
from training.server.store import JobFolder, JobRecord
from training.server.tally import Meters

log = logging.getLogger("fl_llama.training")


class Keeper:
    """Writes in the background. A disk that is full is counted and shown in `error`, and the job goes on.

    `kept` are the steps that can be restored, ascending; there is nothing in it before `look`.
    """

    def __init__(
        self,
        record: JobRecord,
        folder: JobFolder,
        host: Host,
        engine: Engine,
        plan: AdapterPlan,
        clock: JobClock,
        meters: Meters,
    ) -> None:
        self.kept: list[int] = []
        self.error: str | None = None
        self._record = record
        self._folder = folder
        self._host = host
        self._engine = engine
        self._plan = plan
        self._clock = clock
        self._meters = meters
        self._saving: asyncio.Task[None] | None = None
        self._writing = asyncio.Lock()

    async def look(self) -> None:
        """See which checkpoints are there."""
        self.kept = await self._host.in_background(self._folder.checkpoints.steps)

    async def restore(self, step: int, clients: Mapping[int, int]) -> None:
        """Have the weights be those after `step`; later checkpoints are void. Raises `CheckpointError`."""
        await self._engine.restore(self._folder.checkpoints, step, clients)
        self.kept = [kept for kept in self.kept if kept <= step]

    async def save(self, step: int) -> None:
        """Begin to write a checkpoint; the one before it is on the disk by then."""
        await self.settle()
        tensors = await self._engine.snapshot()
        work = self._save(step, tensors, {"generation": self._record.generation})
        self._saving = asyncio.get_running_loop().create_task(work, name=f"checkpoint-of-{self._record.id}")

    async def settle(self) -> None:
        """Wait until what is being written is on the disk, or is not."""
        if self._saving is not None:
            await self._saving

    async def _save(self, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, int]) -> None:
        try:
            await self._host.in_background(lambda: self._folder.checkpoints.save(step, tensors, meta))
        except CacheError as error:
            self._fault(error)
        else:
            self.kept = [*(each for each in self.kept if each != step), step][-KEPT_CHECKPOINTS:]
            self.error = None
            await self.write()

    async def write(self) -> None:
        """Write job.json."""
        async with self._writing:
            if self._record.ended is None:
                self._record.seconds = self._clock.now()
            content = self._record.to_json()
            try:
                await self._host.in_background(lambda: self._folder.write(content))
            except CacheError as error:
                self._fault(error)

    def _fault(self, error: CacheError) -> None:
        log.error("job goes on without a checkpoint id=%s: %s", self._record.id, error.message)
        self.error = error.message
        self._meters.faults.inc()

    # Adapters

    async def adapter(self) -> bytes:
        """Give the shared adapters as a safetensors file: as they are, or as they were when the job last kept them.

        Raises `AdapterMismatch` where they are no finite numbers, `CheckpointError`, `CacheError`.
        """
        if self._engine.has_state:
            return await self._encoded(await self._engine.adapters(), self._record.step)
        data = await self._host.in_background(self._folder.read_adapter)
        if data is None or self._record.ended is None:
            tensors, step = await self._host.in_background(lambda: self._engine.stored(self._folder.checkpoints))
            data = await self._encoded(tensors, step)
        return data

    async def keep_adapter(self) -> None:
        """Write the shared adapters' file."""
        data = await self._encoded(await self._engine.adapters(), self._record.step)
        try:
            await self._host.in_background(lambda: self._folder.write_adapter(data))
        except CacheError as error:
            self._fault(error)

    async def _encoded(self, tensors: Mapping[str, Tensor], step: int) -> bytes:
        def encode() -> bytes:
            if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
                raise AdapterMismatch("the job's adapters hold values that are no finite numbers: a step was too large")
            return self._plan.file(tensors, self._host.model, step)

        return await self._host.in_background(encode)
