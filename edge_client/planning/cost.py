"""What a token will cost, from what was measured. Pure: no clock, no torch, no socket.

A round feeds `1 + g` rows, the sampled token's and those of `g` guesses in a chain, through A, the wire, B, the wire, C
and the head. If each guess is right with probability `r` wherever all before it were, a round brings
`1 + r + ... + r^g` tokens. All parts of a round follow each other; nothing of it overlaps.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from split_llama.config import BlockRange, Partition
from split_llama.wire.codec import Codec, row_bytes
from split_llama.wire.frame import HEADER_SIZE

# Rows of a prompt that travel as one piece (`edge_client.generate.PREFILL_ROWS`; a test holds the two together).
CHUNK_ROWS = 128


@dataclass(frozen=True, slots=True)
class Curve:
    """Seconds by number of rows: straight lines between the points, and on behind the last; never falling."""

    points: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, measured: Mapping[int, float]) -> Curve:
        """Take measurements as they are: noise may have made more rows cheaper, which is evened out."""
        points, most = [], 0.0
        for rows in sorted(measured):
            most = max(most, measured[rows])
            points.append((rows, most))
        assert points, "a curve needs a point"
        return cls(tuple(points))

    def at(self, rows: int) -> float:
        """Seconds of so many rows, at least as many as any fewer take."""
        counts = [count for count, _ in self.points]
        place = bisect.bisect_left(counts, rows)
        if place == 0:
            return self.points[0][1]
        if len(counts) == 1:
            return self.points[0][1] * rows / counts[0]
        (x0, y0), (x1, y1) = self.points[min(place, len(counts) - 1) - 1 :][:2]
        return y0 + (y1 - y0) * (rows - x0) / (x1 - x0)

    def scaled(self, factor: float) -> Curve:
        """Give every point times `factor`, at least 0."""
        assert factor >= 0, "time does not run backwards"
        return Curve(tuple((rows, seconds * factor) for rows, seconds in self.points))


@dataclass(frozen=True, slots=True)
class Parts:
    """Seconds by what they go to. `wait` is the way there and back, `wire` what the bytes add to it by their number;
    `overhead` is what the edge takes beside computing: threads that wake each other, the event loop, text."""

    a: float = 0.0
    c: float = 0.0
    head: float = 0.0
    sampling: float = 0.0
    drafting: float = 0.0
    codec: float = 0.0
    wire: float = 0.0
    wait: float = 0.0
    server: float = 0.0
    overhead: float = 0.0

    @property
    def total(self) -> float:
        """All of it: nothing is counted twice or left out."""
        return sum(self.as_dict().values())

    def as_dict(self) -> dict[str, float]:
        """Give the parts by name, in the order of a table."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def per(self, count: float) -> Parts:
        """Give the share of one of `count`."""
        return Parts(**{name: seconds / count for name, seconds in self.as_dict().items()})


@dataclass(frozen=True, slots=True)
class Format:
    """How the edge keeps its weights: values of the settings `dtype` and `quantization`."""

    dtype: str
    quantization: str = "none"

    @property
    def label(self) -> str:
        """What they are, in a word."""
        return self.dtype if self.quantization == "none" else self.quantization


@dataclass(frozen=True, slots=True)
class Model:
    """What of the model matters to time and room. `kv_bytes` is for one position of one block at the edge."""

    num_blocks: int
    width: int
    hosted: BlockRange
    max_length: int
    kv_bytes: int

    def allows(self, partition: Partition) -> bool:
        """Whether the server hosts all that `partition` leaves to it."""
        p, q, count = partition.p, partition.q, self.num_blocks
        return p + q < count and self.hosted.contains(BlockRange(p, count - q))

    def partitions(self) -> list[Partition]:
        """Every partition that can be had and keeps at least one block in front, those of fewest blocks first."""
        count = self.num_blocks
        every = (Partition(p, q) for p in range(1, count) for q in range(count - p))
        return sorted(filter(self.allows, every), key=lambda partition: (partition.p + partition.q, partition.p))


@dataclass(frozen=True, slots=True)
class DeviceSpeed:
    """This device with weights of one format. `a` and `c` are what the segments take beside their blocks; `overhead` is
    per round, `sampling` per token. `embedding_bytes` is 0 where the table stays in its file."""

    format: Format
    block: Curve
    a: Curve
    c: Curve
    head: Curve
    codec: Curve
    sampling: float
    overhead: float
    block_bytes: int
    head_bytes: int
    embedding_bytes: int = 0


@dataclass(frozen=True, slots=True)
class LinkSpeed:
    """The way to the server: an empty round trip in seconds, and bytes per second each way (infinite: too fast to
    tell)."""

    round_trip: float
    up: float = math.inf
    down: float = math.inf


@dataclass(frozen=True, slots=True)
class ServerSpeed:
    """The server, measured over `blocks` blocks: a step by its rows, of which `fixed` seconds do not go to blocks.
    `opening` is what a session's first token takes on top: the session is made, and a public first row goes apart."""

    blocks: int
    step: Curve
    fixed: float = 0.0
    opening: float = 0.0

    def at(self, rows: int, blocks: int) -> float:
        """Seconds of a step of `rows` rows over `blocks` blocks."""
        whole = self.step.at(rows)
        fixed = min(self.fixed, whole)
        return fixed + (whole - fixed) * blocks / self.blocks


@dataclass(frozen=True, slots=True)
class Drafting:
    """Guesses: the chance that one is right where all before it were, and what making one costs. `source` says where
    the figures come from."""

    acceptance: float
    seconds_per_guess: float
    source: str

    def tokens_per_round(self, guesses: int) -> float:
        """Give the mean number of tokens that a round with so many guesses brings."""
        return sum(self.acceptance**depth for depth in range(guesses + 1))


@dataclass(frozen=True, slots=True)
class Task:
    """What is to be answered: its lengths say when the first token comes and how many rows are released."""

    prompt_tokens: int
    answer_tokens: int
    noise: bool


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to run."""

    partition: Partition
    format: Format
    codec: Codec
    guesses: int


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a choice comes to. `parts` and bytes are per token; `rows_released` is for the whole task."""

    choice: Choice
    parts: Parts
    tokens_per_round: float
    first_token_seconds: float
    memory_bytes: int
    bytes_up: float
    bytes_down: float
    rows_released: int

    @property
    def tokens_per_second(self) -> float:
        """Speed behind the first token."""
        return 1 / self.parts.total


@dataclass(frozen=True, slots=True)
class Measured:
    """All that a prediction rests on."""

    model: Model
    devices: tuple[DeviceSpeed, ...]
    link: LinkSpeed
    server: ServerSpeed
    drafting: Drafting

    def device(self, format: Format) -> DeviceSpeed:
        """Give the figures of one format."""
        return next(device for device in self.devices if device.format == format)


def predict(measured: Measured, choice: Choice, task: Task) -> Prediction:
    """Say what `choice` will come to."""
    tokens = measured.drafting.tokens_per_round(choice.guesses)
    rows = 1 + choice.guesses
    message = HEADER_SIZE + rows * row_bytes(choice.codec, measured.model.width)
    return Prediction(
        choice=choice,
        parts=_round(measured, choice, tokens, message).per(tokens),
        tokens_per_round=tokens,
        first_token_seconds=_first_token(measured, choice, task.prompt_tokens),
        memory_bytes=_memory(measured, choice),
        bytes_up=message / tokens,
        bytes_down=message / tokens,
        rows_released=_rows_released(rows / tokens, task),
    )


def _round(measured: Measured, choice: Choice, tokens: float, message: int) -> Parts:
    device, link, rows = measured.device(choice.format), measured.link, 1 + choice.guesses
    blocks = measured.model.num_blocks - choice.partition.p - choice.partition.q
    return Parts(
        a=_segment(device.a, device.block, choice.partition.p, rows),
        c=_segment(device.c, device.block, choice.partition.q, rows) if choice.partition.q else 0.0,
        head=device.head.at(rows),
        sampling=device.sampling * tokens,
        drafting=measured.drafting.seconds_per_guess * choice.guesses,
        codec=device.codec.at(rows),
        wire=message / link.up + message / link.down,
        wait=link.round_trip,
        server=measured.server.at(rows, blocks),
        overhead=device.overhead,
    )


def _segment(beside: Curve, block: Curve, blocks: int, rows: int) -> float:
    return beside.at(rows) + blocks * block.at(rows)


def _first_token(measured: Measured, choice: Choice, prompt: int) -> float:
    """A prompt runs in chunks at once: the first goes all the way, each further one adds what its slowest stage takes.

    A and C share one thread here.
    """
    device, partition = measured.device(choice.format), choice.partition
    chunks = [CHUNK_ROWS] * (prompt // CHUNK_ROWS) + [prompt % CHUNK_ROWS] * (prompt % CHUNK_ROWS > 0)
    stages = [_stages(measured, choice, rows) for rows in chunks]
    behind = sum(max(stage) for stage in stages[1:])
    once = device.head.at(1) + device.sampling + device.overhead + measured.link.round_trip + measured.server.opening
    assert partition.p + partition.q < measured.model.num_blocks, "a block is left for the server"
    return sum(stages[0]) + behind + once


def _stages(measured: Measured, choice: Choice, rows: int) -> tuple[float, ...]:
    """Seconds of a chunk at the edge, on the way up, at the server, and on the way down."""
    device, link, partition = measured.device(choice.format), measured.link, choice.partition
    edge = _segment(device.a, device.block, partition.p, rows) + device.codec.at(rows)
    if partition.q:
        edge += _segment(device.c, device.block, partition.q, rows)
    size = HEADER_SIZE + rows * row_bytes(choice.codec, measured.model.width)
    blocks = measured.model.num_blocks - partition.p - partition.q
    # Without blocks in C only the last row comes back.
    return edge, size / link.up, measured.server.at(rows, blocks), size / link.down if partition.q else 0.0


def _memory(measured: Measured, choice: Choice) -> int:
    """Weights, and KV for one session of full length."""
    device, blocks = measured.device(choice.format), choice.partition.p + choice.partition.q
    weights = blocks * device.block_bytes + device.head_bytes + device.embedding_bytes
    return weights + blocks * measured.model.kv_bytes * measured.model.max_length


def _rows_released(rows_per_token: float, task: Task) -> int:
    """Rows that are sent once with their own noise: the prompt's, and those of every round. The last token is not."""
    return math.ceil(task.prompt_tokens + (task.answer_tokens - 1) * rows_per_token) if task.noise else 0


def predict_all(
    measured: Measured, partitions: Sequence[Partition], codecs: Sequence[Codec], guesses: Sequence[int], task: Task
) -> list[Prediction]:
    """Predict every combination, with all formats that were measured."""
    return [
        predict(measured, Choice(partition, device.format, codec, count), task)
        for partition in partitions
        for device in measured.devices
        for codec in codecs
        for count in guesses
    ]
