"""CUDA graphs for small passes: which are captured, how a pass is padded to one, and its replay. One owner.

A graph is captured for a `Capacity`: rows, table width and work items at the steps of a ladder. A pass takes the
smallest that holds it. What is left over is padding: rows that are neither stored nor read by anyone, items that do
nothing. Rows of sessions with other blocks pass by where they do not take part.
"""

from __future__ import annotations

import bisect
import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.frame_codec.kernel import decode_rows
from kernels.kv_pages import KVPages
from serving.device.adapters import DeviceAdapters
from serving.device.blocks import run_blocks
from serving.device.device import Device
from serving.device.inputs import Capacity, Geometry, HostInputs, LaunchCapacity, block_inputs, fields, fill
from serving.device.memory import HostArena, Packing
from serving.device.staging import RowSource, row_stride
from split_llama.engine.plan import SequenceRun
from split_llama.layers import Segment
from split_llama.mask import MAX_TREE_NODES
from split_llama.wire.codec import Codec

MAX_GRAPH_ROWS = 512
# Pages of a table, at least: graphs need not differ for every length of a session.
LEAST_PAGES = 256
MAX_GRAPHS = 256
# A shape is captured when it comes for the second time: until then a capture would cost more than it saves.
MEETINGS_UNTIL_CAPTURE = 2
WARM_UP_CHUNKS = (1, 2, 4, 8)

log = logging.getLogger("fl_llama.device")


def row_ladder(most: int) -> tuple[int, ...]:
    """Give the row counts that graphs are captured for: fine steps where decoding is, coarse ones above."""
    steps = [1, 2, 4, *range(8, 65, 8), *range(96, 257, 32), *range(320, MAX_GRAPH_ROWS + 1, 64)]
    return (*(step for step in steps if step < most), most)


@dataclass(frozen=True, slots=True)
class Most:
    """The most that one pass takes."""

    rows: int
    sequences: int


@dataclass(frozen=True, slots=True)
class _Graph:
    """A captured pass: the buffer that its integers are copied to, and what runs it."""

    packing: Packing
    buffer: Tensor
    replay: Callable[[], None]


class Graphs:
    """Owns the graphs of small passes and the static memory around them.

    Rows enter through `_payload` and are decoded in the graph, or are put into `_states` before it; all leave through
    `_outputs`, which the next replay overwrites.
    """

    def __init__(
        self,
        segment: Segment,
        pages: Sequence[KVPages],
        geometry: Geometry,
        device: Device,
        most: Most,
        adapters: DeviceAdapters | None = None,
    ) -> None:
        self._segment = segment
        self._pages = pages
        self._geometry = geometry
        self._device = device
        self._adapters = adapters
        self._max_sequences = most.sequences
        self._ladder = row_ladder(min(most.rows, MAX_GRAPH_ROWS))
        self._graphs: dict[Capacity, _Graph] = {}
        self._met: Counter[Capacity] = Counter()
        self._last: _Graph | None = None
        width, on = segment.config.hidden_size, device.torch_device
        self._states = torch.zeros((self._ladder[-1], width), dtype=segment.dtype, device=on)
        self._outputs = torch.zeros_like(self._states)
        widest = row_stride(Codec.FP32, width)
        self._payload = torch.zeros(self._ladder[-1] * widest, dtype=torch.uint8, device=on)

    @property
    def captured(self) -> tuple[Capacity, ...]:
        """What has been captured."""
        return tuple(self._graphs)

    def serves(self, runs: Sequence[SequenceRun]) -> bool:
        """Say whether a pass is small enough: decodes, drafts and short ends of prompts only."""
        few = all(run.count <= MAX_TREE_NODES for run in runs)
        return few and sum(run.count for run in runs) <= self._ladder[-1]

    def run(self, inputs: HostInputs, rows: RowSource | Tensor, arena: HostArena) -> Tensor | None:
        """Run a pass over all blocks of the segment; `None` where its shape has no graph yet.

        Gives `[N, D]` in memory that the next run overwrites.
        """
        if isinstance(rows, RowSource) and len(rows.payload) > len(self._payload):
            return None
        capacity = self.fit(inputs.needs)
        graph = self._graphs.get(capacity)
        if graph is None:
            self._met[capacity] += 1
            if self._met[capacity] < MEETINGS_UNTIL_CAPTURE or len(self._graphs) >= MAX_GRAPHS:
                return None
            graph = self._capture(capacity, arena)
        count = len(inputs.positions)
        source = self._put_rows(rows)
        self._put_integers(graph, inputs, source, arena)
        graph.replay()
        self._last = graph
        return self._outputs[:count]

    def repeat(self) -> None:
        """Replay the last pass on the integers and rows that it left: what the device alone takes for it."""
        assert self._last is not None, "no pass was replayed yet"
        self._last.replay()

    def fit(self, needs: Capacity) -> Capacity:
        """Give the smallest step of the ladder that holds a pass."""
        rows = self._ladder[bisect.bisect_left(self._ladder, needs.rows)]
        launches = (
            LaunchCapacity(launch.tiles, items, items)
            for launch in needs.launches
            for items in [_power_of_two(launch.items)]
        )
        pages = max(LEAST_PAGES, _power_of_two(needs.pages))
        return Capacity(rows, rows, pages, tuple(launches), needs.mixed, needs.adapted)

    def _put_rows(self, rows: RowSource | Tensor) -> RowSource | None:
        if isinstance(rows, Tensor):
            self._states[: len(rows)].copy_(rows)
            return None
        self._payload[: len(rows.payload)].copy_(rows.payload, non_blocking=True)
        return rows

    def _put_integers(self, graph: _Graph, inputs: HostInputs | None, rows: RowSource | None, arena: HostArena) -> None:
        host = arena.take(graph.packing.size)
        fill(graph.packing.arrays(host), inputs, rows)
        graph.buffer.copy_(host, non_blocking=True)

    def _capture(self, capacity: Capacity, arena: HostArena) -> _Graph:
        segment, geometry = self._segment, self._geometry
        packing = Packing(fields(capacity, segment.blocks, geometry))
        buffer = torch.empty(packing.size, dtype=torch.uint8, device=self._device.torch_device)
        tensors = packing.tensors(buffer)
        states, outputs = self._states[: capacity.rows], self._outputs[: capacity.rows]

        def work() -> None:
            decode_rows(self._payload, tensors["offsets"], tensors["codecs"], states, aligned=states.shape[1] % 2 == 0)
            inputs = block_inputs(tensors, capacity, segment.blocks, geometry)
            outputs.copy_(run_blocks(segment, segment.blocks, states, inputs, self._pages, self._adapters))

        # Captured on padding alone: nothing is stored, nothing is read.
        host = arena.take(packing.size)
        fill(packing.arrays(host), None, None)
        buffer.copy_(host, non_blocking=True)
        started = time.perf_counter()
        graph = _Graph(packing, buffer, self._device.capture(work))
        self._graphs[capacity] = graph
        log.debug("captured a pass rows=%d seconds=%.3f", capacity.rows, time.perf_counter() - started)
        return graph

    def warm_up(self, seconds: float, arena: HostArena) -> None:
        """Capture what decoding will need first, for about `seconds` at most; the rest is captured when it is met."""
        started = time.perf_counter()
        likely = list(self._likely())
        for done, capacity in enumerate(likely):
            if time.perf_counter() - started > seconds:
                log.info("captured %d of %d graphs, the others when they are needed", done, len(likely))
                return
            arena.reset()
            self._capture(capacity, arena)
        log.info("captured %d graphs seconds=%.1f", len(likely), time.perf_counter() - started)

    def _likely(self) -> Iterator[Capacity]:
        """Yield capacities of decode passes: one row per session, short contexts first, plain before mixed.

        Those with adapters come last.
        """
        seen: set[Capacity] = set()
        segment, geometry = self._segment, self._geometry
        full = bisect.bisect_left(self._ladder, min(self._max_sequences, self._ladder[-1]))
        mixtures = (False, True) if len(segment.blocks) > 1 else (False,)
        adapted = (False,) if self._adapters is None else (False, True)
        kinds = itertools.product(adapted, mixtures, WARM_UP_CHUNKS, self._ladder[: full + 1])
        for with_adapters, mixed, chunks, rows in kinds:
            launch = LaunchCapacity(geometry.tiles(1), rows * chunks, rows * chunks)
            capacity = self.fit(Capacity(rows, rows, 1, (launch,), mixed, with_adapters))
            if capacity not in seen:
                seen.add(capacity)
                yield capacity


def _power_of_two(value: int) -> int:
    return 1 << max(value - 1, 0).bit_length()
