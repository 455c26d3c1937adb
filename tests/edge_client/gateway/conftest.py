"""A real gateway on loopback in the test's own event loop, over a real split-server in the same one."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI

from edge_client.gateway.run import serve
from edge_client.gateway.service import AnswerService
from edge_client.gateway.settings import GatewaySettings
from edge_client.runtime import EdgeRuntime
from tests.edge_client.conftest import MakeSettings, ServeModel


@dataclass
class Gateway:
    """A gateway under test: where it is, and what stands behind it."""

    url: str
    server: str
    service: AnswerService

    @property
    def model(self) -> str:
        return self.service.model

    def http(self, **options: Any) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.url, timeout=60, trust_env=False, **options)

    def openai(self, **options: Any) -> AsyncOpenAI:
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key="any", **({"max_retries": 0} | options))

    async def sessions(self) -> list[dict[str, Any]]:
        """The server's sessions of this edge."""
        async with httpx.AsyncClient(trust_env=False) as client:
            found: list[dict[str, Any]] = (await client.get(f"{self.server}/v1/sessions")).json()["data"]
            return found


StartGateway = Callable[..., AbstractAsyncContextManager[Gateway]]


@pytest.fixture
def start_gateway(serve_model: ServeModel, edge_settings: MakeSettings) -> StartGateway:
    """Serve a model folder and a gateway over it: `async with start_gateway(folder, max_concurrent=2) as gateway`."""

    @contextlib.asynccontextmanager
    async def start(
        folder: Path, *, edge: dict[str, Any] | None = None, server: dict[str, Any] | None = None, **changes: Any
    ) -> AsyncIterator[Gateway]:
        gateway = GatewaySettings(**({"port": 0} | changes))
        async with serve_model(folder, **(server or {})) as server_url:
            settings = edge_settings(server_url, **(edge or {}))
            async with EdgeRuntime.connect(settings, max_sessions=gateway.max_concurrent) as runtime:
                service = AnswerService(runtime, settings, gateway)
                with socket.create_server(("127.0.0.1", 0)) as bound:
                    async with serve(service, gateway, bound) as url:
                        yield Gateway(url, server_url, service)

    return start
