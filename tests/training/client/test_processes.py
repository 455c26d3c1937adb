"""Real processes: a server and clients, killed in mid-job, come to the same weights as those that nobody disturbed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from live_server import free_port, start_server
from torch import Tensor

from split_llama.errors import JobEnded
from split_llama.lora import read_adapter
from training.client.jobs import JobKey, JobsClient
from training.job_config import JobConfig
from training.settings import TrainSettings

PATIENCE = 180.0

# Dropout and noise on: what is random follows from seeds, secrets and places.
CONFIG: dict[str, Any] = {
    "steps": 24,
    "batch_size": 2,
    "accumulate": 2,
    "max_length": 96,
    "checkpoint_every": 4,
    "codec": "fp32",
    "gradient_codec": "fp32",
    "lora": {"r": 2, "alpha": 4, "dropout": 0.1},
    "optimizer": {"lr": 1e-3},
}


@dataclass
class Party:
    """One server and its clients, all processes of their own."""

    folder: Path
    secrets: Path
    config: dict[str, Any] = field(default_factory=lambda: CONFIG)
    port: int = field(default_factory=free_port)

    def __post_init__(self) -> None:
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.folder.mkdir()
        self.settings = TrainSettings(server=f"http://127.0.0.1:{self.port}", reconnect_seconds=30.0)

    def start_server(self) -> None:
        flags = ["--extension", "training", "--extension-dir", str(self.folder / "server")]
        self.processes["server"] = start_server("demo", self.port, *flags)

    def create(self) -> None:
        with JobsClient.of(self.settings) as jobs:
            self.job: JobKey = jobs.create(JobConfig.parse(self.config))

    def start_client(self, name: str, *flags: str) -> None:
        words = [f"--server=http://127.0.0.1:{self.port}", f"--job={self.job.id}", f"--name={name}", "--task=demo"]
        words += [f"--share={name}/2", f"--out={self.folder}", "--quiet", "--threads=1", "--no-tensorboard"]
        words += [f"--state-dir={self.secrets}", f"--cache-dir={self.secrets}", *flags]
        with (self.folder / f"client-{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", "training.cli", "client", *words],
                stderr=log,
                env={**os.environ, "FL_LLAMA_TRAIN_JOB_KEY": self.job.key},
            )

    def kill(self, name: str) -> None:
        process = self.processes.pop(name)
        process.kill()
        process.wait()

    def step(self, name: str) -> int:
        file = self.folder / f"client-{name}" / "log.jsonl"
        lines = file.read_bytes().splitlines() if file.is_file() else []
        steps = [json.loads(line).get("step", 0) for line in lines if line.endswith(b"}")]
        return max(steps, default=0)

    def log(self, name: str) -> str:
        return (self.folder / f"client-{name}.log").read_text()

    def wait(self, what: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not what():
            assert time.monotonic() < deadline, "it did not come to pass"
            time.sleep(0.02)

    def wait_for_more(self, name: str) -> None:
        """Wait until a client has got further than it is."""
        before = self.step(name)
        self.wait(lambda: self.step(name) > before)

    def wait_for_clients(self) -> None:
        for name in ("0", "1"):
            code = self.processes.pop(name).wait(timeout=PATIENCE)
            assert code == 0, self.log(name)

    def weights(self) -> list[dict[str, Tensor]]:
        with JobsClient.of(self.settings) as jobs:
            shared = dict(jobs.adapter(self.job).tensors)
        return [shared, *(dict(read_adapter(self.folder / f"client-{name}" / "adapter").tensors) for name in "01")]

    def close(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()


@contextlib.contextmanager
def party(folder: Path, secrets: Path, **config: Any) -> Iterator[Party]:
    party = Party(folder, secrets, CONFIG | config)
    try:
        party.start_server()
        party.create()
        yield party
    finally:
        party.close()


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One edge secret for all parties, so that their noise is the same."""
    return tmp_path_factory.mktemp("secrets")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, secrets: Path) -> list[dict[str, Tensor]]:
    with party(tmp_path_factory.mktemp("calm") / "run", secrets) as calm:
        calm.start_client("0")
        calm.start_client("1")
        calm.wait_for_clients()
        return calm.weights()


def equal(left: list[dict[str, Tensor]], right: list[dict[str, Tensor]]) -> bool:
    return all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(left, right, strict=True)
    )


@pytest.mark.timeout(600)  # nine starts of processes, on machines that have other things to do
def test_clients_killed_or_told_to_go_and_a_killed_server_change_no_weight(
    tmp_path: Path, secrets: Path, undisturbed: list[dict[str, Tensor]]
) -> None:
    with party(tmp_path / "run", secrets) as run:
        run.start_client("0")
        run.start_client("1")
        run.wait(lambda: run.step("1") >= 6)
        run.kill("1")
        run.start_client("1")
        run.wait_for_more("0")
        run.processes["0"].send_signal(signal.SIGINT)
        assert run.processes.pop("0").wait(timeout=30) == 130
        assert "left after step" in run.log("0")
        assert "Come back with the same command" in run.log("0")
        run.start_client("0")
        run.wait_for_more("1")
        run.kill("server")
        run.start_server()
        run.wait_for_clients()
        assert "the server was lost" in run.log("1")
        assert equal(run.weights(), undisturbed)


def test_wrong_data_is_told_by_file_and_line_before_anybody_is_asked(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a", "respnse": "b"}\n')
    words = ["client", "--server=http://127.0.0.1:9", "--job=j", "--job-key=k", "--name=a", f"--out={tmp_path}"]
    ended = subprocess.run(
        [sys.executable, "-m", "training.cli", *words, f"--data={file}"], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2
    assert f"{file}, line 2" in ended.stderr
    assert not list(tmp_path.glob("client-*"))


@pytest.mark.slow
def test_a_client_that_is_alone_says_so_and_what_was_never_trained_is_no_result(tmp_path: Path, secrets: Path) -> None:
    with party(tmp_path / "run", secrets) as run:
        run.start_client("0")
        run.wait(lambda: "waiting for 1 more client (1 of 2 are here)" in run.log("0"))
        run.processes["0"].send_signal(signal.SIGINT)
        assert run.processes.pop("0").wait(timeout=30) == 130
        assert "left before the job began" in run.log("0")
        with JobsClient.of(run.settings) as jobs:
            jobs.cancel(run.job)
        for name, said in (("0", "after step 0 of 24"), ("1", "the job is cancelled and nobody can join it any more")):
            run.start_client(name)
            assert run.processes.pop(name).wait(timeout=60) == JobEnded.exit_code
            assert said in run.log(name)
        assert not (run.folder / "client-0" / "adapter").exists()
        assert not (run.folder / "client-1").exists()
