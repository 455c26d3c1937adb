"""What the benchmarks of split fine-tuning share: a model, data, jobs of real processes, and what their times say.

Server, link and clients are processes of their own, each with one CPU thread. What is timed lies between two closed
steps as every client's own log has them, so starting processes and loading weights are left out.
"""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import free_port, wait_until_ready, write_random_model
from training.client.jobs import JobKey, JobsClient
from training.job_config import JobConfig
from training.settings import TrainSettings

# 16.0M parameters, 10.6M of them in the blocks of B: a sample's compute is of the order of a round trip here.
MODEL_16M: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 384,
    "intermediate_size": 1056,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "vocab_size": 2048,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# The geometry of emulated devices: 32 blocks, as LLaMA-7B has, and so narrow that nothing is really computed.
MODEL_THIN: Mapping[str, Any] = dict(
    MODEL_16M, hidden_size=64, intermediate_size=64, num_hidden_layers=32, num_attention_heads=1, num_key_value_heads=1
)
TARGETS = 16
SAMPLES = 64
PARTY = "benchmarks.training_party"
START_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Seconds:
    """A pass takes `fixed` seconds and `row` seconds more for each row."""

    fixed: float
    row: float

    def of(self, rows: int) -> float:
        """Give the seconds of a pass of so many rows."""
        return self.fixed + self.row * rows


@dataclass(frozen=True, slots=True)
class DeviceTimes:
    """What an emulated device takes: B and a client's ends, there and back; C's way includes the head and back.

    With `apart` each client's rows have a device of their own, and a pass takes as long as its largest group does.
    """

    b_forward: Seconds
    b_backward: Seconds
    a_forward: Seconds
    c: Seconds
    a_backward: Seconds
    apart: bool = False


@dataclass(frozen=True, slots=True)
class ClientSpec:
    """What a client's process is told."""

    url: str
    model: str
    job: str
    key: str
    name: str
    data: str
    out: str
    times: DeviceTimes | None = None
    noise: str = "0"

    def to_json(self) -> str:
        """Write it for the command line."""
        return json.dumps(asdict(self))


def device_times(raw: Mapping[str, Any] | None) -> DeviceTimes | None:
    """Read what `asdict` made of device times."""
    if raw is None:
        return None
    fields: dict[str, Any] = {key: Seconds(**part) if isinstance(part, dict) else part for key, part in raw.items()}
    return DeviceTimes(**fields)


@contextlib.contextmanager
def prepared_model(geometry: Mapping[str, Any]) -> Iterator[Path]:
    """Write a random model for a block."""
    with tempfile.TemporaryDirectory(prefix="fl-llama-bench-") as temporary:
        yield write_random_model(Path(temporary) / "model", geometry)


def write_pairs(file: Path, rows: int, seed: int, vocabulary: int, samples: int = SAMPLES) -> Path:
    """Write samples of made-up words, each of exactly `rows` tokens of which the last `TARGETS` are learned."""
    draw = random.Random(seed)

    def words(count: int) -> str:
        return " ".join(f"w{draw.randrange(3, vocabulary)}" for _ in range(count))

    # An answer's end is a token too.
    lines = [{"prompt": words(rows - TARGETS), "response": " " + words(TARGETS - 1)} for _ in range(samples)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@contextlib.contextmanager
def training_server(
    model: Path, *flags: str, times: DeviceTimes | None = None, cpu: str | None = None
) -> Iterator[tuple[str, int]]:
    """Run a server with the training extension, and where `times` says so emulated blocks; give its URL and pid.

    `cpu` pins it to a core.
    """
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="fl-llama-jobs-") as jobs:
        arguments = [str(model), "--port", str(port), "--threads", "1", "--dtype", "float32", "--log-level", "warning"]
        arguments += ["--extension-dir", jobs, *flags]
        command = [*pinned(cpu), sys.executable, "-m", PARTY, "server", json.dumps(times and asdict(times)), *arguments]
        process = subprocess.Popen(command)
        url = f"http://127.0.0.1:{port}"
        try:
            wait_until_ready(url, process, START_SECONDS)
            yield url, process.pid
        finally:
            process.terminate()
            process.wait(timeout=30)


def pinned(cpu: str | None) -> list[str]:
    """Give the words before a command that is to stay on some cores."""
    return [] if cpu is None else ["taskset", "-c", cpu]


@dataclass(slots=True)
class Finished:
    """What a job's clients logged, one list of steps per client, and the server's last word of it."""

    logs: list[list[dict[str, Any]]]
    status: dict[str, Any] = field(default_factory=dict)

    def seconds(self, first: int) -> float:
        """Give the seconds from step `first`, at which all met, to the last one: the slowest client's."""
        return max(log[-1]["seconds"] - _at(log, first)["seconds"] for log in self.logs)

    def bytes_per_sample(self, first: int) -> dict[str, float]:
        """Give bytes up and down per sample after step `first`."""
        samples = sum(record["samples"] for log in self.logs for record in log if record["step"] > first)
        found = {}
        for name in ("bytes_up", "bytes_down"):
            found[name] = sum(log[-1][name] - _at(log, first)[name] for log in self.logs) / samples
        return found


def _at(log: Sequence[dict[str, Any]], step: int) -> dict[str, Any]:
    return next(record for record in log if record["step"] == step)


class Job:
    """A job on a server, and the processes of its clients."""

    def __init__(self, server: str, config: JobConfig) -> None:
        self.config = config
        self._settings = TrainSettings(server=server)
        with JobsClient.of(self._settings) as jobs:
            self.key: JobKey = jobs.create(config)

    def status(self) -> dict[str, Any]:
        """Ask the server."""
        with JobsClient.of(self._settings) as jobs:
            return jobs.status(self.key)

    def cancel(self) -> None:
        """End it."""
        with JobsClient.of(self._settings) as jobs:
            jobs.cancel(self.key)

    @contextlib.contextmanager
    def clients(
        self, url: str, model: Path, folder: Path, rows: int, times: DeviceTimes | None = None, cpu: str | None = None
    ) -> Iterator[list[subprocess.Popen[bytes]]]:
        """Run all clients for a block, each with samples of `rows` tokens; those that still run then are ended."""
        vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
        folder.mkdir(parents=True)
        processes = []
        try:
            for number in range(self.config.clients):
                data = write_pairs(folder / f"{number}.jsonl", rows, number, vocabulary)
                spec = ClientSpec(
                    url, str(model), self.key.id, self.key.key, f"c{number}", str(data), str(folder), times
                )
                command = [*pinned(cpu), sys.executable, "-m", PARTY, "client", spec.to_json()]
                with (folder / f"{number}.err").open("wb") as errors:
                    processes.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=errors))
            yield processes
        finally:
            for process in processes:
                if process.poll() is None:
                    process.terminate()
            for process in processes:
                process.wait(timeout=30)

    def finished(self, folder: Path) -> Finished:
        """Read what the clients logged."""
        logs = []
        for number in range(self.config.clients):
            lines = (folder / f"client-c{number}" / "log.jsonl").read_text().splitlines()
            records = [json.loads(line) for line in lines]
            notes = [record["note"] for record in records if "note" in record]
            trouble = [note for note in notes if not note.startswith("waiting for")]
            assert not trouble, f"client {number}: {trouble[:3]}"
            logs.append([record for record in records if "step" in record])
        return Finished(logs, self.status())


def run_job(
    server: str,
    url: str,
    model: Path,
    config: JobConfig,
    rows: int,
    times: DeviceTimes | None = None,
    cpu: str | None = None,
) -> Finished:
    """Run a job to its end with its clients connected through `url`. Raises `RuntimeError` if one of them fails."""
    with tempfile.TemporaryDirectory(prefix="fl-llama-clients-") as temporary:
        folder = Path(temporary) / "out"
        job = Job(server, config)
        with job.clients(url, model, folder, rows, times, cpu) as processes:
            codes = [process.wait() for process in processes]
        if any(codes):
            said = (folder / f"{next(number for number, code in enumerate(codes) if code)}.err").read_text()
            raise RuntimeError(f"clients ended with {codes}: {said[-500:]}")
        return job.finished(folder)


def ask_party(*arguments: str, cpu: str | None = None) -> Any:
    """Run a part of `benchmarks.training_party` in a process of its own; give the JSON that it prints."""
    command = [*pinned(cpu), sys.executable, "-m", PARTY, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def ask_parties(count: int, *arguments: str) -> list[Any]:
    """Run the same part `count` times at once; give what each prints."""
    command = [sys.executable, "-m", PARTY, *arguments]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(count)]
    return [json.loads(process.communicate()[0]) for process in processes]
