"""A server for all tests of the page's client, and a client."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from protocol_page.client import Client
from protocol_page.server import Server
from protocol_page.wire import Rows, WebSocketLink
from tiny_models import TinyModel, write_model


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests: llama, hidden 32, 4 layers, float32."""
    folder = tmp_path_factory.mktemp("page")
    running = Server(write_model(folder / "model", TinyModel(family="llama")), folder / "server.log")
    yield running
    running.kill()


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    """A client with a WebSocket of its own."""
    link = WebSocketLink(server.port)
    yield Client(link)
    link.close()


@pytest.fixture
def states() -> Rows:
    """Rows to send: 64 positions of hidden size 32."""
    return np.random.default_rng(7).standard_normal((64, 32)).astype(np.float32)
