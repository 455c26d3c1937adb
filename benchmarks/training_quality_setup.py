"""What the quality of fine-tuning is measured on: data, budget, and one named setting for each run."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

from split_llama.checkpoint import Checkpoint
from split_llama.hub import resolve_model
from training.job_config import JobConfig
from training.tasks.demo_task import demo_examples
from training.tasks.encoding import Encoder
from training.tasks.examples import AnyExample, Sample
from training.tasks.partition import partition
from training.tasks.readers import read_task

CENTRAL = "centralized"
STRATEGIES = ("sequential", "client-batch", "server-hierarchical")
HELD_OUT = 1000
MULTIRC_EVERY = 20
LORA = {"r": 8, "alpha": 16.0}

WORK = Path("runs/training-quality")
DATA = Path(os.environ.get("FL_LLAMA_DATA", "../shared/data"))


@dataclass(frozen=True)
class Task:
    """A data set with the model that learns it, and its budget: `steps` of `batch` samples, whoever has them.

    "demo" is the demo model's task, "multirc" MultiRC as the paper has it (a yes or no is learned), "passages" its
    texts as they are, every token of them.
    """

    name: Literal["demo", "multirc", "passages"]
    model: str
    steps: int
    batch: int
    max_length: int
    lr: float

    @cached_property
    def folder(self) -> Path:
        """Where the model is."""
        return resolve_model(self.model)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The model, opened."""
        return Checkpoint.open(self.folder)

    @cached_property
    def encoder(self) -> Encoder:
        """Makes samples of examples."""
        return Encoder.open(self.folder, self.max_length)

    @property
    def reader(self) -> str:
        """What `[data] task` calls it."""
        return "text" if self.name == "passages" else self.name

    def file(self, part: Literal["train", "val"]) -> Path | None:
        """Give the data file, none for the demo task; the others are written here."""
        if self.name == "demo":
            return None
        lines = (DATA / "multirc" / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
        if self.name == "passages":
            return _write(f"passages-{part}.txt", "\n\n".join(json.loads(line)["passage"]["text"] for line in lines))
        # As many verdicts as are looked at in the budget, or about that.
        return _write(f"multirc-{part}.jsonl", "\n".join(lines[::MULTIRC_EVERY] if part == "train" else lines))

    @cached_property
    def train(self) -> list[AnyExample]:
        """What is learned from."""
        return [*read_task(self.reader, self.file("train"))]

    @cached_property
    def held_out(self) -> list[Sample]:
        """What is scored, encoded: some of the validation's examples, from all its passages."""
        demo: list[AnyExample] = [*demo_examples("test", HELD_OUT)] if self.name == "demo" else []
        found = demo or list(read_task(self.reader, self.file("val")))
        if self.name == "multirc":
            found = found[:: len(found) // HELD_OUT]
        return self.encoder.encode(found).samples


def _write(name: str, text: str) -> Path:
    WORK.mkdir(parents=True, exist_ok=True)
    (WORK / name).write_text(text + "\n", encoding="utf-8")
    return WORK / name


@lru_cache
def task(name: str) -> Task:
    """Give a task by name."""
    if name == "demo":
        return Task("demo", "demo", steps=300, batch=8, max_length=512, lr=3e-3)
    if name == "multirc":
        return Task("multirc", "demo", steps=150, batch=8, max_length=128, lr=3e-3)
    # stories260K has never seen an end token, and cannot learn to give one: it is for running text only.
    return Task("passages", str(DATA / "stories260K"), steps=200, batch=8, max_length=128, lr=3e-3)


@dataclass(frozen=True)
class Setup:
    """One run. `deal` says how the data is dealt out to `clients`; all runs of a task see equally many samples."""

    strategy: str
    clients: int = 1
    deal: str = "iid"
    shared: Literal["B", "A,B,C"] = "A,B,C"
    seed: int = 0
    task: str = "demo"
    p: int = 1
    noise: str = "0"
    codec: str = "fp32"
    gradient_codec: str = "fp32"

    @property
    def name(self) -> str:
        """A name for files, different for different runs."""
        parts = [self.task, self.strategy, self.clients, self.deal, self.shared.replace(",", ""), f"seed{self.seed}"]
        parts += [f"p{self.p}", f"noise{self.noise}", self.codec, self.gradient_codec]
        return "-".join(map(str, parts)).replace(":", "").replace("=", "")

    @property
    def of_task(self) -> Task:
        """The task."""
        return task(self.task)

    @property
    def config(self) -> JobConfig:
        """The job. One client's turn, and all clients of a joint step together, have the task's batch."""
        each = self.clients if self.strategy in STRATEGIES[1:] else 1
        raw: dict[str, Any] = {
            "name": "quality",
            "strategy": self.strategy if self.strategy != CENTRAL else "sequential",
            "clients": self.clients,
            "partition": f"{self.p},1",
            "shared": self.shared,
            "steps": self.of_task.steps,
            "batch_size": self.of_task.batch // each,
            "max_length": self.of_task.max_length,
            "seed": self.seed,
            "lora": LORA,
            "optimizer": {"lr": self.of_task.lr, "warmup_steps": self.of_task.steps // 10},
            "codec": self.codec,
            "gradient_codec": self.gradient_codec,
            "average_every": 5,
            "checkpoint_every": self.of_task.steps,
        }
        return JobConfig.parse(raw, self.name)

    def shares(self) -> list[list[Sample]]:
        """Give each client's samples."""
        dealt = partition(self.of_task.train, self.clients, self.deal, self.seed)
        return [self.of_task.encoder.encode(own).samples for own in dealt]
