"""Fixtures: a tiny model with a server's extension on it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import TinyModel, write_model

from tests.training.server.world import World

MakeWorld = Callable[..., Awaitable[World]]


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny"), TinyModel(layers=4, hidden=32, vocab=320))


@pytest.fixture
async def make_world(tiny_folder: Path, tmp_path: Path) -> AsyncIterator[MakeWorld]:
    worlds: list[World] = []

    async def make(**options: Any) -> World:
        world = World(tiny_folder, tmp_path / f"files-{len(worlds)}", **options)
        worlds.append(world)
        await world.extension.start()
        return world

    yield make
    for world in worlds:
        await world.close()


@pytest.fixture
async def world(make_world: MakeWorld) -> World:
    return await make_world()
