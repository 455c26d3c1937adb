"""What a server keeps of its jobs on disk: for each a folder of job.json, checkpoints, and at the end the adapters."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from split_llama.adapter_file import replace_file
from split_llama.errors import CacheError, CheckpointError, FlLlamaError
from split_llama.json_file import read_json
from training.checkpoints import Checkpoints
from training.job_config import JobConfig
from training.roster import Seat
from training.server.tally import Tally

JOB_FILE = "job.json"
ADAPTER_FILE = "adapter.safetensors"
VERSION = 1

log = logging.getLogger("fl_llama.training")


@dataclass(slots=True)
class JobRecord:
    """What job.json says. `key` is a hash; `ended` is done, failed or cancelled, and `reason` says more."""

    id: str
    owner: str
    key: str
    config: JobConfig
    geometry: str
    created: float
    generation: int = 0
    paused: bool = False
    ended: str | None = None
    reason: str | None = None
    step: int = 0
    seconds: float = 0.0
    seats: dict[int, Seat] = field(default_factory=dict)
    tally: Tally = field(default_factory=Tally)

    def to_json(self) -> dict[str, Any]:
        """Give the content of job.json."""
        plain = ("id", "owner", "key", "geometry", "created", "generation", "paused", "ended", "reason", "step")
        seats = [
            {
                "index": seat.index,
                "name": seat.name,
                "secret": seat.secret,
                "samples": seat.samples,
                "since": seat.since,
            }
            for seat in self.seats.values()
        ]
        return {
            "version": VERSION,
            **{name: getattr(self, name) for name in plain},
            "seconds": round(self.seconds, 3),
            "config": self.config.model_dump(mode="json"),
            "seats": seats,
            "tally": self.tally.to_json(),
        }

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], where: str) -> JobRecord:
        """Read job.json. Raises `CheckpointError`, `UsageError`."""
        if raw.get("version") != VERSION:
            raise CheckpointError(f"{where}: version {VERSION} was expected, {raw.get('version')!r} is there")
        fields = {name: value for name, value in raw.items() if name != "version"}
        try:
            config = JobConfig.parse(fields.pop("config"), where)
            seats = {seat["index"]: Seat(**seat) for seat in fields.pop("seats")}
            return cls(config=config, seats=seats, tally=Tally.from_json(fields.pop("tally")), **fields)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{where} is damaged: {type(error).__name__} {error}") from error


class JobFolder:
    """One job's files. Everything here blocks."""

    def __init__(self, path: Path, ident: str) -> None:
        """Use `path`, made if there is none. Raises `CacheError`."""
        self._path = path
        self.checkpoints = Checkpoints(path / "checkpoints", f"the server of job {ident}")

    def write(self, content: Mapping[str, Any]) -> None:
        """Replace job.json. Raises `CacheError`."""
        self._replace(JOB_FILE, json.dumps(content, indent=1).encode())

    def write_adapter(self, data: bytes) -> None:
        """Replace the adapters' file. Raises `CacheError`."""
        self._replace(ADAPTER_FILE, data)

    def read_adapter(self) -> bytes | None:
        """Give the adapters' file, if there is one. Raises `CacheError`."""
        try:
            return (self._path / ADAPTER_FILE).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CacheError(f"{self._path / ADAPTER_FILE} cannot be read: {error.strerror or error}") from error

    def _replace(self, name: str, data: bytes) -> None:
        try:
            replace_file(self._path / name, data)
        except OSError as error:
            raise CacheError(f"{self._path / name} cannot be written: {error.strerror or error}") from error


class Store:
    """All jobs' folders below one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def open(self, ident: str) -> JobFolder:
        """Give a job's folder, made if there is none. Raises `CacheError`."""
        return JobFolder(self._folder / ident, ident)

    def remove(self, ident: str) -> None:
        """Remove a job's folder, if there is one; checkpoints go first, while job.json still says whose they are.

        Raises `CacheError`.
        """
        path = self._folder / ident
        try:
            for part in (path / "checkpoints", path):
                if part.exists():
                    shutil.rmtree(part)
        except OSError as error:
            raise CacheError(f"{path} cannot be removed: {error.strerror or error}") from error

    def load(self) -> list[JobRecord]:
        """Read all jobs, the oldest first; one that cannot be read is logged and left where it is."""
        records = []
        for file in self._folder.glob(f"*/{JOB_FILE}"):
            try:
                record = JobRecord.from_json(read_json(file), str(file))
            except FlLlamaError as error:
                log.error("job left out: %s", error.message)
            else:
                records.append(record)
        return sorted(records, key=lambda record: record.created)
