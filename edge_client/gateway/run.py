"""The gateway's process: the edge connected first, then a socket that people can use, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

import uvicorn

from edge_client.answer import progress_bar
from edge_client.gateway.app import create_app
from edge_client.gateway.chat_messages import MAX_MESSAGE
from edge_client.gateway.service import AnswerService
from edge_client.gateway.settings import GatewaySettings
from edge_client.rest import ModelCard
from edge_client.runtime import EdgeRuntime, prepare
from edge_client.settings import EdgeSettings
from edge_client.threads import in_thread
from split_llama.errors import UsageError

UNSENT_MS = 30_000
LINGER_SECONDS = 3
MAX_HEADER_BYTES = 64 * 1024
PING_SECONDS = 20.0
# What is longer than the chat takes is refused in words up to here, and ends its connection beyond.
WS_MAX_BYTES = 4 * MAX_MESSAGE
FORCED_EXIT = 130
# uvicorn logs these as errors; the first is a refused handshake, the second a stream that nobody reads.
NOISE = (
    "ASGI callable returned without completing handshake.",
    "ASGI callable returned without completing response.",
)

log = logging.getLogger("fl_llama.gateway")


class _Server(uvicorn.Server):
    """uvicorn without its own signal handlers: ours close the conversations first."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def configure_logging(level: str) -> None:
    """Send lines to stderr. Never texts, token ids or keys."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    handler.addFilter(lambda record: record.msg not in NOISE)
    quiet = level.upper() if level in ("debug", "error") else "WARNING"
    for name, threshold in (("fl_llama", level.upper()), ("edge_client", level.upper()), ("uvicorn", quiet)):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.propagate = False
        logger.setLevel(threshold)


def listen(settings: GatewaySettings) -> socket.socket:
    """Bind the address. Raises `UsageError` if it cannot be had."""
    try:
        info = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        bound = socket.create_server(info[4][:2], family=info[0], backlog=256)
    except OSError as error:
        raise UsageError(
            f"cannot listen at {settings.host} port {settings.port}: {error.strerror or error}; "
            "is something else running there? choose with --host and --port"
        ) from error
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        # Whoever stops reading must not hold a half-sent answer for ever; accepted sockets inherit this.
        bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNSENT_MS)
    bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    bound.setblocking(False)
    return bound


def run(settings: EdgeSettings, gateway: GatewaySettings, card: ModelCard) -> int:
    """Serve until SIGTERM or SIGINT; gives the exit code. Raises `FlLlamaError`."""
    gateway.check()
    configure_logging(gateway.log_level)
    with listen(gateway) as bound, asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_until_stopped(_serve(settings, gateway, card, bound)))
    return 0


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop
    return uvloop.new_event_loop


async def _until_stopped(work: Coroutine[Any, Any, None]) -> None:
    """Run until a signal comes, which cancels the work; it cleans up after itself."""
    stop = asyncio.Event()
    _catch_signals(stop)
    working, stopping = asyncio.create_task(work), asyncio.create_task(stop.wait())
    await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not working.done():
        log.info("shutting down; a second signal ends at once")
        working.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await working


async def _serve(settings: EdgeSettings, gateway: GatewaySettings, card: ModelCard, bound: socket.socket) -> None:
    with progress_bar(quiet=False) as progress:
        source = await in_thread(lambda: prepare(settings, card=card, progress=progress, notify=log.info))
    async with (
        EdgeRuntime.connect(settings, max_sessions=gateway.max_concurrent, source=source) as edge,
        serve(AnswerService(edge, settings, gateway), gateway, bound) as url,
    ):
        log.info("ready: chat at %s, OpenAI's API at %s/v1", url, url)
        await asyncio.Event().wait()


@contextlib.asynccontextmanager
async def serve(service: AnswerService, gateway: GatewaySettings, bound: socket.socket) -> AsyncIterator[str]:
    """Serve on a bound socket for the block; give the URL. Answers under way at its end are cancelled."""
    config = uvicorn.Config(
        create_app(service, gateway, gateway.keys()),
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        ws_per_message_deflate=False,
        ws_max_size=WS_MAX_BYTES,
        ws_ping_interval=PING_SECONDS,
        ws_ping_timeout=PING_SECONDS,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        timeout_graceful_shutdown=LINGER_SECONDS,
    )
    server = _Server(config)
    serving = asyncio.create_task(server.serve(sockets=[bound]), name="uvicorn")
    try:
        yield _url(bound)
    finally:
        server.should_exit = True
        await serving


def _url(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _catch_signals(stop: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if stop.is_set():
            os._exit(FORCED_EXIT)
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            loop.add_signal_handler(number, on_signal)
        except NotImplementedError:  # Windows
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(on_signal))
