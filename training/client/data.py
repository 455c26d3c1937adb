"""A client's data: files to examples before anything is sent, then samples, then micro-batches by number."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from split_llama.errors import UsageError
from training.compute.batch import Batch
from training.tasks.encoding import Encoded, Encoder
from training.tasks.examples import AnyExample
from training.tasks.order import Order
from training.tasks.partition import Dealing, partition
from training.tasks.readers import read_task, recognise

# Running text goes by these names; what else has no known format may be anything.
PLAIN = ("", ".txt", ".text", ".md")


@dataclass(frozen=True, slots=True)
class DataPart:
    """What a client trains on: a task's file, or of it share `index` of `of`, dealt out as `how` says.

    `path` is `None` for the task that makes its own examples. `seed` decides who gets what.
    """

    task: str
    path: Path | None = None
    index: int = 0
    of: int = 1
    how: str = "iid"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.of:
            raise UsageError(f"a share is INDEX/OF with 0 <= INDEX < OF, such as 0/2; got {self.index}/{self.of}")
        Dealing.parse(self.how)

    @classmethod
    def parse_share(cls, text: str) -> tuple[int, int]:
        """Read `INDEX/OF`. Raises `UsageError`."""
        index, slash, of = text.partition("/")
        if not (slash and index.isdecimal() and of.isdecimal()):
            raise UsageError(f"a share is INDEX/OF, such as 0/2; got {text!r}")
        return int(index), int(of)

    @property
    def known_task(self) -> str:
        """The task, by the file's first line where it was not named. Raises `UsageError` where that is not sure."""
        if self.task != "auto" or self.path is None:
            return self.task
        found = recognise(self.path)
        if found == "text" and self.path.suffix.lower() not in PLAIN:
            raise UsageError(
                f"{self.path}: the first line is none of a known format. If all of it is running text to be learned "
                "as it stands, say --task text; otherwise docs/training-data.md lists the formats"
            )
        return found

    def read(self) -> list[AnyExample]:
        """Read the examples. Raises `UsageError` that names file and line of one that does not parse."""
        examples = list(read_task(self.known_task, self.path))
        if self.of == 1:
            return examples
        return partition(examples, self.of, self.how, self.seed)[self.index]


class ClientData:
    """Micro-batches of encoded samples, each a pure function of its number."""

    def __init__(self, encoded: Encoded, batch_size: int, seed: int) -> None:
        self.samples = len(encoded.samples)
        self.shortened, self.left_out = encoded.shortened, encoded.left_out
        self._order = Order(encoded.samples, batch_size, seed)

    @classmethod
    def encode(
        cls, examples: list[AnyExample], folder: Path, max_length: int, batch_size: int, seed: int
    ) -> ClientData:
        """Encode examples with the tokenizer of a model folder. Raises `UsageError`."""
        return cls(Encoder.open(folder, max_length).encode(examples), batch_size, seed)

    def batch(self, index: int) -> Batch:
        """Give micro-batch `index`, from 0."""
        samples = self._order.batch(index)
        return Batch.of([sample.token_ids for sample in samples], [sample.labels for sample in samples])
