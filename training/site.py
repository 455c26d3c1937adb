"""A run that has begun: where its server is, its job, and what its clients are told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.client.jobs import JobKey
from training.run_file import RunFile, as_flags
from training.settings import TrainSettings

# In the folder of a run.
JOB_FILE = "job.json"
KEY_FILE = "job-key"
SHARED_FILE = "shared.safetensors"
SUMMARY_FILE = "summary.json"


@dataclass(frozen=True, slots=True)
class Site:
    """A run that has begun: its file, the server's address, and its job."""

    file: RunFile
    url: str
    job: JobKey

    @property
    def model(self) -> str:
        """The model as the server was told."""
        return str(self.file.server["model"])

    def client_name(self, index: int) -> str:
        """The name of client `index`."""
        return str(index)

    def client_folder(self, index: int) -> Path:
        """Its folder."""
        return self.file.out / f"client-{self.client_name(index)}"

    def client_command(self, index: int) -> list[str]:
        """The arguments of `split-train` for client `index`, without keys."""
        data, job = self.file.data, self.file.job
        words = ["client", f"--server={self.url}", f"--job={self.job.id}", f"--name={self.client_name(index)}"]
        words.append(f"--task={data.task}")
        if len(data.train) == job.clients > 1:
            words.append(f"--data={data.train[index]}")
        else:
            words += [f"--data={path}" for path in data.train]
            words += [f"--share={index}/{job.clients}", f"--deal={data.partition}", f"--deal-seed={job.seed}"]
        # All on one machine have the model already: nothing is fetched, and no address is trusted for good.
        own = {"model": self.model} | dict(self.file.client)
        return [*words, f"--out={self.file.out}", *as_flags(own)]

    def settings(self) -> TrainSettings:
        """How this process itself talks to the server."""
        return own_settings(self.file, self.url)


def own_settings(file: RunFile, url: str) -> TrainSettings:
    """How this process itself talks to the server."""
    key = file.client.get("api_key") or file.server.get("api_key")
    return TrainSettings(server=url, api_key=key, ca_certs=_path(file.client.get("ca_certs")), reconnect_seconds=30.0)


def _path(value: Any) -> Path | None:
    return None if value is None else Path(value)
