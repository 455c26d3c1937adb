"""A real split-server for the tests that need one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tiny_models import TinyModel, write_model

from tests.loadtest.bench import Bench


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    home = tmp_path_factory.mktemp("loadtest")
    made = Bench(home, write_model(home / "tiny", TinyModel()))
    yield made
    for command in made.commands:
        command.end()


@pytest.fixture(scope="module")
def server_url(bench: Bench) -> str:
    """One server for the tests that leave it alive."""
    return bench.server()[1]
