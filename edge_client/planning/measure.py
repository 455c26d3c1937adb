"""Measures device, link and server for a plan. No weights are fetched, and nothing of the user's is sent."""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from edge_client.connector import Connector
from edge_client.link import ServerLink
from edge_client.planning.cost import (
    Choice,
    Curve,
    DeviceSpeed,
    Drafting,
    Format,
    LinkSpeed,
    Measured,
    Model,
    ServerSpeed,
    Task,
    predict,
)
from edge_client.planning.device import Answers, Geometry, free_bytes, measure_format, share_bytes
from edge_client.planning.link_speed import Prober, measure_round_trip
from edge_client.planning.talk import Notify
from edge_client.planning.watch import Watched
from edge_client.rest import ModelCard, RestClient
from edge_client.settings import EdgeSettings
from split_llama.config import BlockRange, ModelConfig, Partition
from split_llama.errors import CheckpointError, FlLlamaError, ModelMismatch, NotAServer, UsageError
from split_llama.load import parse_device, parse_dtype, set_up_cpu
from split_llama.noise import NoiseSpec
from split_llama.wire.codec import Codec
from split_llama.wire.control import Open
from split_llama.wire.frame import HEADER_SIZE

MAX_CONFIG_BYTES = 1 << 20
# What is assumed where nothing was measured: every second guess is right, and making one takes as long as one block.
ASSUMED_ACCEPTANCE = 0.5


@dataclass(frozen=True, slots=True)
class Subject:
    """What to measure: a server's model and the settings to use it with."""

    settings: EdgeSettings
    card: ModelCard
    geometry: Geometry

    @property
    def model(self) -> Model:
        """The model as the cost model sees it."""
        config = self.geometry.config
        width = 4 if self.geometry.device.type == "cpu" else 2
        return Model(
            num_blocks=config.num_hidden_layers,
            width=config.hidden_size,
            hosted=self.card.blocks,
            max_length=min(self.card.max_model_len, config.max_position_embeddings),
            kv_bytes=2 * config.num_key_value_heads * config.head_dim * width,
        )


@dataclass(frozen=True, slots=True)
class Findings:
    """What was measured, and what is free here; `notes` say what was left out and why."""

    measured: Measured
    free_bytes: int | None
    notes: tuple[str, ...]


def find_subject(settings: EdgeSettings, rest: RestClient, card: ModelCard) -> Subject:
    """Ask for the model's geometry. Blocking. Raises `FlLlamaError`."""
    count = card.num_hidden_layers
    raw = _fetch_config(rest, Partition(card.blocks.start, count - card.blocks.stop))
    try:
        config = ModelConfig.from_hf(raw)
    except (TypeError, ValueError, OverflowError, AttributeError) as error:
        raise CheckpointError(f"{rest.address.base}: its config.json cannot be read ({error})") from error
    if config.geometry_digest() != card.geometry:
        raise ModelMismatch(f"{rest.address.base}: its config.json is not that of the model it says it serves")
    geometry = Geometry(
        raw=raw,
        config=config,
        partition=_partition_to_measure(card),
        codec=Codec.parse(settings.codec),
        noise=NoiseSpec.parse(settings.noise),
        device=parse_device(settings.device),
    )
    return Subject(settings, card, geometry)


def least_partition(card: ModelCard) -> Partition:
    """Give the partition of fewest blocks with one in front, and one behind where that leaves any to the server."""
    count = card.num_hidden_layers
    p, least_q = max(1, card.blocks.start), count - card.blocks.stop
    if p + least_q >= count:
        raise UsageError(
            f"the model has {count} blocks and the server hosts {card.blocks}: that leaves no partition with a block "
            "in front (p of 1 or more), and nothing to plan"
        )
    q = max(1, least_q)
    return Partition(p, q if p + q < count else least_q)


def _partition_to_measure(card: ModelCard) -> Partition:
    """One block more in front than behind, if there is room: the difference tells what a block takes."""
    least = least_partition(card)
    wished = Partition(max(least.p, least.q + 1), least.q)
    return wished if wished.p + wished.q < card.num_hidden_layers else least


def _fetch_config(rest: RestClient, partition: Partition) -> dict[str, object]:
    content = b""
    with rest.slice_file(partition, "config.json", 0) as (_, pieces):
        for piece in pieces:
            content += piece
            if len(content) > MAX_CONFIG_BYTES:
                raise NotAServer(f"{rest.address.base}: its config.json is larger than {MAX_CONFIG_BYTES} bytes")
    try:
        raw = json.loads(content)
    except ValueError as error:
        raise CheckpointError(f"{rest.address.base}: its config.json is no JSON ({error})") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{rest.address.base}: its config.json is no JSON object")
    return raw


def own_format(settings: EdgeSettings, card: ModelCard, device_type: str) -> Format:
    """Give the format that the settings ask for."""
    automatic = card.dtype if device_type == "cuda" else "float32"
    name = automatic if settings.dtype == "auto" else settings.dtype
    return Format(str(parse_dtype(name)).removeprefix("torch."), settings.quantization)


def formats_to_try(own: Format, device_type: str) -> list[Format]:
    """The user's own first, then those that this kind of device can run, the exacter ones first."""
    plain = [Format(name) for name in ("float32", "float16", "bfloat16")]
    if device_type == "cpu":
        others = [*plain, Format("float32", "int8")]
    else:
        quantised = ("int8", "fp8", "int4") if importlib.util.find_spec("torchao") else ()
        others = [*plain[1:], *(Format("bfloat16", name) for name in quantised)]
    return list(dict.fromkeys([own, *others]))


async def measure(subject: Subject, formats: Sequence[Format], notify: Notify) -> Findings:
    """Measure everything. Raises `FlLlamaError` when the server cannot be reached or no format can be run."""
    settings, geometry = subject.settings, subject.geometry
    set_up_cpu(settings.threads)
    blocks = geometry.partition.segment_b(geometry.config.num_hidden_layers)
    half = BlockRange(blocks.start, blocks.start + max(1, len(blocks) // 2))
    whole, fewer = (_opening(subject.card, some) for some in (blocks, half))
    notify("measuring the link and the server with random rows")
    round_trip = await measure_round_trip(settings, whole)
    async with ServerLink(Connector.of(settings), reconnect_seconds=settings.reconnect_seconds) as link:
        prober = Prober(link, whole)
        speed = await prober.bandwidth(round_trip)
        steps = await prober.steps(speed)
        devices, answers, notes = await _measure_formats(geometry, formats, link, (whole, fewer), notify)
    server = _server_speed(steps, answers, speed, (len(blocks), len(half)))
    devices = _disturbed(devices, answers)
    drafting = Drafting(ASSUMED_ACCEPTANCE, devices[0].block.at(1), "assumed")
    measured = Measured(subject.model, tuple(devices), speed, server, drafting)
    opening_seconds = _opening_seconds(measured, answers, geometry)
    measured = dataclasses.replace(measured, server=dataclasses.replace(server, opening=opening_seconds))
    return Findings(measured, free_bytes(geometry.device), tuple(notes))


async def _measure_formats(
    geometry: Geometry, formats: Sequence[Format], link: ServerLink, openings: tuple[Open, Open], notify: Notify
) -> tuple[list[DeviceSpeed], list[Answers], list[str]]:
    devices, answers, notes = [], [], []
    refusal: FlLlamaError | None = None
    for format in formats:
        need, free = share_bytes(geometry, format), free_bytes(geometry.device)
        if free is not None and need > free:
            notes.append(
                f"{format.label}: not measured, it takes some {need / 2**20:,.0f} MiB of {free / 2**20:,.0f} free"
            )
            continue
        notify(f"measuring this device with {format.label} weights")
        try:
            device, answer = await measure_format(geometry, format, link, *openings)
        except UsageError as error:
            refusal = error
            notes.append(f"{format.label}: {error.message}")
            continue
        devices.append(device)
        answers.append(answer)
        gc.collect()  # the next format needs the room
    if not devices:
        raise refusal or UsageError("not enough memory here for the edge's part: " + "; ".join(notes))
    return devices, answers, notes


def _opening(card: ModelCard, blocks: BlockRange) -> Open:
    return Open(session="0" * 32, secret="0" * 64, blocks=(blocks.start, blocks.stop), geometry=card.geometry)


def _disturbed(devices: Sequence[DeviceSpeed], answers: Sequence[Answers]) -> list[DeviceSpeed]:
    """Parts are medians; what rounds take beyond them on average goes to the overhead, the same for every format."""
    every = statistics.fmean(one.disturbance for both in answers for one in (both.whole, both.fewer))
    return [dataclasses.replace(device, overhead=device.overhead + every) for device in devices]


def _server_speed(steps: Curve, answers: Sequence[Answers], link: LinkSpeed, blocks: tuple[int, int]) -> ServerSpeed:
    """What rows add, from the probes; what one row takes, over all blocks and over fewer, from the answers: between
    their steps the server was idle, as it will be."""
    whole, fewer = blocks
    seen = statistics.median([_at_the_server(one.whole, link) for one in answers])
    seen_fewer = statistics.median([_at_the_server(one.fewer, link) for one in answers])
    per_block = max(0.0, seen - seen_fewer) / (whole - fewer) if whole > fewer else seen / whole
    shift = seen - steps.at(1)
    step = Curve.of({rows: max(seen, seconds + shift) for rows, seconds in steps.points})
    return ServerSpeed(whole, step, max(0.0, seen - whole * per_block))


def _at_the_server(answer: Watched, link: LinkSpeed) -> float:
    size = answer.bytes_up / answer.rows_up if answer.rows_up else HEADER_SIZE
    way = link.round_trip + size / link.up + size / link.down
    return max(0.0, answer.median(lambda one: one.away) - way)


def _opening_seconds(measured: Measured, answers: Sequence[Answers], geometry: Geometry) -> float:
    """What the first tokens of the answers took beyond the prediction for prompts of their length."""
    late = []
    for device, answer in zip(measured.devices, answers, strict=True):
        choice = Choice(geometry.partition, device.format, geometry.codec, 0)
        foretold = predict(measured, choice, Task(answer.whole.prompt_tokens, 2, False)).first_token_seconds
        late.append(answer.whole.first_token - foretold)
    return max(0.0, statistics.median(late))
