"""A core over a tiny model, in-process connections to it, and whole-sequence outputs to compare with."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from raw_edge import Floats, RawEdge
from tiny_models import TinyModel, write_model

from serving.core import Core
from serving.dataplane import serve_channel
from serving.hosted import Hosted, load_hosted
from serving.keys import ANONYMOUS, KeyRing, Principal
from serving.limits import NO_LIMITS, Limits
from serving.settings import ServerSettings
from split_llama.config import BlockRange
from split_llama.engine.engine import Engine
from split_llama.transport.inprocess import InProcessTransport

BLOCKS = (1, 5)
MODEL = TinyModel(layers=6, hidden=32, max_positions=256)


class Clock:
    """A clock that a test turns."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("served") / "tiny", MODEL)


@pytest.fixture(scope="session")
def states() -> Floats:
    """Some hidden states [200, 32] to send."""
    return np.random.default_rng(7).standard_normal((200, MODEL.hidden)).astype(np.float32)


@pytest.fixture(scope="session")
def whole(model_folder: Path, states: Floats) -> Callable[..., Floats]:
    """Outputs of the hosted blocks for rows fed as one fresh sequence: `whole(rows)` or `whole()` for all states."""
    segment = load_hosted(ServerSettings(model=str(model_folder), device="cpu"), model_folder).engine.segment

    def run(rows: Floats | None = None, blocks: tuple[int, int] = BLOCKS) -> Floats:
        rows = states if rows is None else rows
        engine = Engine(segment, num_pages=32)
        plan = engine.plan([engine.sequence(BlockRange(*blocks), 512).append(len(rows))])
        return engine.run(plan, torch.from_numpy(rows)).numpy()

    return run


class Place:
    """A running core and the way to connect to it."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.transports = AsyncExitStack()

    @property
    def hosted(self) -> Hosted:
        return self.core.hosted

    async def connect(self, owner: str = ANONYMOUS, limits: Limits = NO_LIMITS, **greeting: Any) -> RawEdge:
        transport = InProcessTransport(lambda channel: serve_channel(self.core, channel, Principal(owner, limits)))
        self.transports.push_async_callback(transport.aclose)
        return await RawEdge.greet(await transport.connect(), **greeting)

    def check_pages(self) -> None:
        """Every page is accounted for."""
        sequences = [entry.session.sequence for entry in self.core.registry]
        self.hosted.engine.pool.check_integrity(
            [sequence.block_table for sequence in sequences],
            [sequence.ticket for sequence in sequences if sequence.ticket is not None],
        )


MakePlace = Callable[..., Awaitable[Place]]


@pytest.fixture
async def make_place(model_folder: Path) -> AsyncIterator[MakePlace]:
    """A factory of cores: settings as keywords, `clock`, and `keys` if not everybody may connect."""
    places: list[Place] = []

    async def make(keys: KeyRing | None = None, clock: Callable[[], float] | None = None, **fields: Any) -> Place:
        settings = ServerSettings(**({"model": str(model_folder), "device": "cpu", "max_num_seqs": 4} | fields))
        timed = {} if clock is None else {"clock": clock}
        core = Core(settings, keys or KeyRing(), **timed)
        core.serve(load_hosted(settings, model_folder))
        places.append(Place(core))
        return places[-1]

    yield make
    for place in places:
        await place.transports.aclose()
        await place.core.aclose()


@pytest.fixture
async def place(make_place: MakePlace) -> Place:
    return await make_place()


@pytest.fixture
def clock() -> Clock:
    return Clock()
