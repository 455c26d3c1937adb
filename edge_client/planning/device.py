"""How fast this device is at the edge's share of a model, with weights in one format.

The share is real code over random weights: `EdgeModel` times its own phases. First by itself, with one row and with
several; then in short answers against the real server, because there the caches are cold and threads wake each other.
The rows sent are made of random weights and made-up tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from edge_client.draft import Decision
from edge_client.edge_model import EdgeModel, Placement
from edge_client.generate import EdgeSession
from edge_client.link import ServerLink
from edge_client.planning.cost import Curve, DeviceSpeed, Format
from edge_client.planning.random_checkpoint import RandomCheckpoint
from edge_client.planning.watch import Watched, watch
from edge_client.step_log import EncodedRows
from edge_client.threads import in_thread
from edge_client.turn import GenerationParams, Turn
from edge_client.work import PhaseTimes, Work
from edge_client.worker import EdgeWorker
from split_llama.config import ModelConfig, Partition
from split_llama.load import parse_dtype
from split_llama.noise import NoiseScope, NoiseSpec, PrefixNoise
from split_llama.products import Numerics
from split_llama.wire.codec import Codec, encode_rows
from split_llama.wire.control import Open

ROWS = (1, 4, 16, 64)
# The head is asked for so many rows at most: those of a draft. Of a prompt it sees the last.
HEAD_ROWS = 16
REPEATS = 5
PROMPT = 16
# An answer lasts at least so many tokens and about so long: a shorter one is over before the system's scheduler has
# made it wait for others, as it will.
LEAST_ANSWER = 16
MOST_ANSWER = 256
ANSWER_SECONDS = 1.0
KV_POSITIONS = 2 * REPEATS * sum(ROWS)


@dataclass(frozen=True, slots=True)
class Geometry:
    """What is to be measured: the model's geometry, how it is split for that, and what is done to rows."""

    raw: Mapping[str, Any]
    config: ModelConfig
    partition: Partition
    codec: Codec
    noise: NoiseSpec
    device: torch.device


@dataclass(frozen=True, slots=True)
class _Alone:
    """Seconds of each phase by number of rows, without a server."""

    a: Curve
    c: Curve
    head: Curve
    codec: Curve


@dataclass(frozen=True, slots=True)
class Answers:
    """Answers made against the server: over all blocks that the partition leaves to it, and over fewer."""

    whole: Watched
    fewer: Watched


async def measure_format(
    geometry: Geometry, format: Format, link: ServerLink, whole: Open, fewer: Open
) -> tuple[DeviceSpeed, Answers]:
    """Measure one format, with answers over the blocks of either opening. Raises `FlLlamaError`."""
    numerics = Numerics(parse_dtype(format.dtype), format.quantization, geometry.device)
    model = await in_thread(lambda: _load(geometry, numerics))
    # Beside the event loop, which answers the server's pings.
    alone = await in_thread(lambda: _time_alone(model, geometry))
    answers = Answers(
        fewer=await _long_answer(model, geometry, link, fewer), whole=await _long_answer(model, geometry, link, whole)
    )
    return _combine(geometry, format, model, alone, answers.whole), answers


def share_bytes(geometry: Geometry, format: Format) -> int:
    """Give about how many bytes measuring this format takes: the weights as stored, and once more while they load."""
    bits = {"none": 8 * parse_dtype(format.dtype).itemsize, "int4": 4}.get(format.quantization, 8)
    tensors = RandomCheckpoint.of(geometry.raw, geometry.config, geometry.partition).tensors
    weights = [info.nbytes // 2 for name, info in tensors.items() if "embed" not in name]
    return sum(weights) * bits // 8 + 6 * max(weights)


def free_bytes(device: torch.device) -> int | None:
    """Give the memory that is free on `device` now, if the system tells."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    with contextlib.suppress(OSError, ValueError, StopIteration), open("/proc/meminfo", encoding="ascii") as lines:
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable")))
    with contextlib.suppress(AttributeError, OSError, ValueError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _load(geometry: Geometry, numerics: Numerics) -> EdgeModel:
    checkpoint = RandomCheckpoint.of(geometry.raw, geometry.config, geometry.partition)
    model = EdgeModel(checkpoint, geometry.partition, geometry.codec, Placement(numerics, KV_POSITIONS, 2))
    if geometry.noise.is_on:
        spec = geometry.noise.with_clip(1.0)
        blocks = geometry.partition.segment_b(geometry.config.num_hidden_layers)
        scope = NoiseScope("plan", "", blocks, model.width, spec, numerics.label)
        model.use_noise(spec, PrefixNoise(secrets.token_bytes(32), scope))
    return model


def _time_alone(model: EdgeModel, geometry: Geometry) -> _Alone:
    longest = min(KV_POSITIONS, geometry.config.max_position_embeddings)
    random = np.random.default_rng(0)
    times: dict[int, PhaseTimes] = {}
    for rows in (count for count in ROWS if (1 + REPEATS) * count <= longest):
        states = random.standard_normal((rows, model.width), np.float32)
        replies = (EncodedRows(geometry.codec, rows, encode_rows(geometry.codec, states)),)
        tokens = _tokens(geometry, rows)
        session = model.open(longest)
        try:
            feed = Work(session, tokens=tokens)
            read = Work(session, replies, lambda _logits, _states: Decision(), rows=min(rows, HEAD_ROWS))
            times[rows] = _least([_phases(model, feed, read) for _ in range(1 + REPEATS)])
        finally:
            session.free()
    heads = {min(rows, HEAD_ROWS): times[rows].head for rows in times}
    return _Alone(
        a=Curve.of({rows: spent.a for rows, spent in times.items()}),
        c=Curve.of({rows: spent.c for rows, spent in times.items()}),
        head=Curve.of(heads),
        codec=Curve.of({rows: spent.codec for rows, spent in times.items()}),
    )


def _phases(model: EdgeModel, *works: Work) -> PhaseTimes:
    before = dataclasses.replace(model.times)
    for work in works:
        (result,) = model.run([work])
        if isinstance(result, Exception):
            raise result
    names = [field.name for field in dataclasses.fields(PhaseTimes)]
    return PhaseTimes(**{name: getattr(model.times, name) - getattr(before, name) for name in names})


def _least(spent: list[PhaseTimes]) -> PhaseTimes:
    """Whatever else the machine does only adds: the least time is the truest for how rows compare."""
    names = [field.name for field in dataclasses.fields(PhaseTimes)]
    return PhaseTimes(**{name: min(getattr(one, name) for one in spent) for name in names})


def _tokens(geometry: Geometry, count: int) -> tuple[int, ...]:
    return tuple(7919 * (1 + at) % geometry.config.vocab_size for at in range(count))


async def _long_answer(model: EdgeModel, geometry: Geometry, link: ServerLink, opening: Open) -> Watched:
    """A short answer says how long the other has to be."""
    first = await _answer(model, geometry, link, opening, LEAST_ANSWER)
    if not first.rounds or first.seconds >= ANSWER_SECONDS:
        return first
    wanted = math.ceil(ANSWER_SECONDS / first.median(lambda one: one.seconds))
    return await _answer(model, geometry, link, opening, max(LEAST_ANSWER, min(wanted, MOST_ANSWER)))


async def _answer(model: EdgeModel, geometry: Geometry, link: ServerLink, opening: Open, tokens: int) -> Watched:
    """Make a greedy answer: the tokens are meaningless, the time they take is not."""
    longest = min(KV_POSITIONS, geometry.config.max_position_embeddings, link.hello.max_model_len)
    prompt = _tokens(geometry, max(1, min(PROMPT, longest // 2)))
    params = GenerationParams(max_new_tokens=tokens)
    all_rows = geometry.partition.q > 0
    local, remote, worker = model.open(longest), link.open(opening), EdgeWorker(model)
    try:
        session = EdgeSession(local, remote, worker, all_rows=all_rows, codec=geometry.codec, max_length=longest)
        turn = Turn(params, prompt, longest - len(prompt) + 1, None)
        return await watch(session, prompt, turn, lambda: model.times)
    finally:
        await link.close(remote)
        await worker.ask(local.free)
        await worker.close()


def _combine(geometry: Geometry, format: Format, model: EdgeModel, alone: _Alone, answer: Watched) -> DeviceSpeed:
    """Curves by rows from the model alone, their height from the answer."""
    a = _raised(alone.a, answer.median(lambda one: one.phases.a))
    c = _raised(alone.c, answer.median(lambda one: one.phases.c))
    head = _raised(alone.head, answer.median(lambda one: one.phases.head))
    p, q = geometry.partition.p, geometry.partition.q
    on_cpu = geometry.device.type == "cpu"
    if on_cpu:
        block = block_curve(a, c, p, q)
    else:
        block, c, head = queued_curves(a, c, head, p, q)
    head_bytes = model.head.lm_head.product_bytes
    return DeviceSpeed(
        format=format,
        block=block,
        a=_beside(a, block, p),
        c=_beside(c, block, q),
        head=head,
        codec=_raised(alone.codec, answer.median(lambda one: one.phases.codec)),
        sampling=answer.median(lambda one: one.phases.choose),
        overhead=answer.median(lambda one: one.overhead),
        block_bytes=(model.product_bytes - head_bytes) // (p + q),
        head_bytes=head_bytes,
        embedding_bytes=0 if on_cpu else model.embedding.weight.nbytes,
    )


def _raised(alone: Curve, one_row: float) -> Curve:
    """Move a curve so that one row takes what it took beside a server: cold caches cost the same for all rows."""
    shift = one_row - alone.at(1)
    return Curve.of({rows: max(one_row, seconds + shift) for rows, seconds in alone.points})


def block_curve(a: Curve, c: Curve, p: int, q: int) -> Curve:
    """What one block takes. Where A has a block more than C, the difference is just that: the rest cancels out."""
    seconds = {}
    for rows, _ in a.points:
        share = [curve.at(rows) / blocks for curve, blocks in ((a, p), (c, q)) if blocks]
        most = min(share, default=0.0)
        difference = (a.at(rows) - c.at(rows)) / (p - q) if p != q and q else most
        # Half of a segment's time is in its blocks at the least; else the difference of two noisy times rules.
        seconds[rows] = min(most, max(difference, most / 2))
    return Curve.of(seconds)


def queued_curves(a: Curve, c: Curve, head: Curve, p: int, q: int) -> tuple[Curve, Curve, Curve]:
    """Give one block, C and the head where work is queued: there C's clock stops before C is done, and the head's
    counts the rest. A's waits for its end, so a block is what A says; C and head together stay what they were."""
    block = a.scaled(1 / p)
    true_c = Curve.of({rows: max(seconds, q * block.at(rows)) for rows, seconds in c.points})
    true_head = {rows: max(0.0, seconds + c.at(rows) - true_c.at(rows)) for rows, seconds in head.points}
    return block, true_c, Curve.of(true_head)


def _beside(segment: Curve, block: Curve, blocks: int) -> Curve:
    return Curve.of({rows: max(0.0, seconds - blocks * block.at(rows)) for rows, seconds in segment.points})
