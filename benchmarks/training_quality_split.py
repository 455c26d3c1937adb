"""A run of the real thing: `split-train run` with a server process and a process for each client, read back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.training_quality_setup import Setup
from split_llama.config import Partition
from training.export import CLIENT_PREFIX, adapted_blocks, merge_parts, parts_of_run

LOG_FILE = "log.jsonl"
LONGEST_RUN = 1800


@dataclass(frozen=True)
class Result:
    """What a run left: the job's loss by step, each model's adapters, and what its clients sent and received."""

    curve: list[float]
    models: list[Mapping[str, Tensor]]
    bytes_up: int
    bytes_down: int


def run_split(setup: Setup, folder: Path) -> Result:
    """Run a setup in `folder`, an empty one. Raises `RuntimeError` where it does not come to its end."""
    folder.mkdir(parents=True)
    file = folder / "run.toml"
    file.write_text(_toml(_document(setup, folder)))
    alone = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "training.cli", "run", str(file)]
    with (folder / "run.log").open("w") as log:
        done = subprocess.run(command, env=os.environ | alone, stdout=log, stderr=log, timeout=LONGEST_RUN)
    if done.returncode:
        raise RuntimeError(f"{file} ended with status {done.returncode}; see {folder / 'run.log'}")
    return _read(setup, folder / "out")


def _document(setup: Setup, folder: Path) -> dict[str, Any]:
    file = setup.of_task.file("train")
    data = {"task": setup.of_task.reader, "partition": setup.deal} | ({"train": str(file)} if file else {})
    server = {"model": str(setup.of_task.model), "threads": 1}
    own = {"cache_dir": str(folder / "cache"), "state_dir": str(folder / "state")}
    client = {"noise": setup.noise, "threads": 1, "tensorboard": False} | own
    job = setup.config.model_dump(exclude_none=True)
    return {"out": str(folder / "out"), "job": job, "data": data, "server": server, "client": client}


def _toml(table: Mapping[str, Any], name: str = "") -> str:
    """Write a table whose values TOML and JSON spell alike."""
    plain = {key: value for key, value in table.items() if not isinstance(value, Mapping)}
    lines = [f"[{name}]"] * bool(name) + [f"{key} = {json.dumps(value)}" for key, value in plain.items()]
    parts = [_toml(value, f"{name}.{key}".lstrip(".")) for key, value in table.items() if isinstance(value, Mapping)]
    return "\n".join([*lines, "", *parts])


def _read(setup: Setup, out: Path) -> Result:
    logs = [_records(file) for file in sorted(out.glob(f"{CLIENT_PREFIX}*/{LOG_FILE}"))]
    own_sets = setup.strategy == "server-hierarchical"
    # Where sets are the clients' own, each client knows only its own loss; all have equally many samples in a step.
    curve = [_job_loss([log[step] for log in logs], own_sets) for step in range(setup.config.steps)]
    last = [log[-1] for log in logs]
    return Result(curve, _models(setup, out), sum(x["bytes_up"] for x in last), sum(x["bytes_down"] for x in last))


def _records(file: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [line for line in lines if "step" in line]


def _job_loss(records: list[dict[str, Any]], own_sets: bool) -> float:
    if not own_sets:
        return float(records[0]["job_loss"])
    return sum(float(record["loss"]) for record in records) / len(records)


def _models(setup: Setup, out: Path) -> list[Mapping[str, Tensor]]:
    geometry = setup.of_task.checkpoint.config
    blocks = adapted_blocks(
        geometry.num_hidden_layers, Partition.parse(setup.config.partition), setup.config.lora.segments
    )
    names = sorted(path.name.removeprefix(CLIENT_PREFIX) for path in out.glob(f"{CLIENT_PREFIX}*") if path.is_dir())
    found = [parts_of_run(out, name) for name in (names[:1] if setup.config.shares_all else names)]
    return [merge_parts(parts.parts, geometry, blocks).tensors for parts in found]
