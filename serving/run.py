"""The server process: a socket, uvicorn, the model loaded beside it, signals, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import ssl
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import uvicorn

from serving.app import create_app
from serving.core import Core
from serving.hosted import Hosted, load_hosted
from serving.keys import KeyRing
from serving.settings import ServerSettings
from split_llama.errors import UsageError
from split_llama.hub import fetch_model
from split_llama.load import set_up_cpu

UNSENT_MS = 30_000
LINGER_SECONDS = 3
MAX_HEADER_BYTES = 64 * 1024
FORCED_EXIT = 130
PING_SECONDS = 20.0
# A pong may wait behind a long prompt on a slow uplink.
PONG_SECONDS = 60.0
WS_MAX_BYTES = 2 * 2**20
GOODBYE_SECONDS = 4.0
# uvicorn logs this as an error whenever a WebSocket handshake is refused with a proper HTTP answer.
DENIAL_NOISE = "ASGI callable returned without completing handshake."

log = logging.getLogger("fl_llama.server")


class _Server(uvicorn.Server):
    """uvicorn without its own signal handlers: ours finish the running steps first."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def configure_logging(level: str) -> None:
    """Send structured lines to stderr: time, level, logger, message with key=value pairs. Never states, text or ids."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    handler.addFilter(lambda record: record.msg != DENIAL_NOISE)
    # uvicorn's own lines name every connection at level info; the server says itself what an operator needs.
    quiet = level.upper() if level in ("debug", "error") else "WARNING"
    for name, threshold in (("fl_llama", level.upper()), ("uvicorn", quiet)):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.propagate = False
        logger.setLevel(threshold)


def listen(settings: ServerSettings) -> socket.socket:
    """Bind the address. Raises `UsageError` if it cannot be had."""
    try:
        info = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        bound = socket.create_server(info[4][:2], family=info[0], backlog=1024)
    except OSError as error:
        raise UsageError(
            f"cannot listen at {settings.host} port {settings.port}: {error.strerror or error}; "
            "is another server running there? choose with --host and --port"
        ) from error
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        # A peer that stops reading must not hold a half-sent reply for ever; accepted sockets inherit this.
        bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNSENT_MS)
    # asyncio sets this only on sockets it binds itself; without it a small reply can wait 40 ms for the peer.
    bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    bound.setblocking(False)
    return bound


def make_config(core: Core) -> uvicorn.Config:
    """Give uvicorn's configuration. Raises `UsageError` for TLS files that cannot be used."""
    settings = core.settings
    config = uvicorn.Config(
        create_app(core),
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        ws_per_message_deflate=False,
        ws_max_size=WS_MAX_BYTES,
        ws_ping_interval=PING_SECONDS,
        ws_ping_timeout=PONG_SECONDS,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        timeout_graceful_shutdown=LINGER_SECONDS,
        ssl_certfile=settings.ssl_certfile,
        ssl_keyfile=settings.ssl_keyfile,
        ssl_ca_certs=str(settings.ssl_ca_certs) if settings.ssl_ca_certs else None,
        ssl_cert_reqs=ssl.CERT_REQUIRED if settings.ssl_ca_certs else ssl.CERT_NONE,
    )
    try:
        config.load()
    except (ssl.SSLError, OSError) as error:
        raise UsageError(f"the TLS certificate, key or CA cannot be used: {error}") from error
    return config


@dataclass(frozen=True)
class Address:
    """Where the server listens."""

    scheme: str
    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"


def run(settings: ServerSettings) -> int:
    """Serve until SIGTERM or SIGINT; gives the exit code. Raises `UsageError`, `ModelError`."""
    settings.check()
    configure_logging(settings.log_level)
    keys = KeyRing(settings.api_key, settings.api_key_file)
    if keys.is_open and not settings.is_loopback:
        log.warning(
            "NO API KEY: anyone who reaches %s can use this server. Give --api-key-file (split-server keys create) or "
            "--api-key, and TLS with --ssl-certfile and --ssl-keyfile",
            settings.host,
        )
    with listen(settings) as bound:
        core = Core(settings, keys)
        config = make_config(core)
        # uvloop where it is installed (the extra `scale`), else asyncio's own loop.
        with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
            runner.run(_serve(core, config, bound))
    return 0


async def _serve(core: Core, config: uvicorn.Config, bound: socket.socket) -> None:
    settings = core.settings
    server = _Server(config)
    scheme = "https" if settings.ssl_certfile else "http"
    address = Address(scheme, settings.host, bound.getsockname()[1])
    stop = asyncio.Event()
    _catch_signals(stop)
    stopping = asyncio.create_task(stop.wait(), name="stop")
    serving = asyncio.create_task(server.serve(sockets=[bound]), name="uvicorn")
    try:
        log.info("listening url=%s model=%s", address, settings.model)
        await _load(core, stopping)
        log.info("ready url=%s", address)
        await asyncio.wait({stopping, serving}, return_when=asyncio.FIRST_COMPLETED)
        log.info("shutting down: finishing queued steps; a second signal ends at once")
        await core.drain()
    finally:
        stopping.cancel()
        await _say_goodbye(core)
        server.should_exit = True
        await serving
        await core.aclose()
        log.info("stopped")


async def _load(core: Core, stopping: asyncio.Task[bool]) -> None:
    """Load the model in a thread: health checks are answered meanwhile, and a signal ends the process."""
    loading = asyncio.create_task(asyncio.to_thread(_load_hosted, core.settings), name="load")
    await asyncio.wait({loading, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if not loading.done():
        log.info("stopped while loading")
        # A thread cannot be stopped, and loading may take minutes.
        os._exit(0)
    core.serve(loading.result())


async def _say_goodbye(core: Core) -> None:
    core.closing.set()
    deadline = core.clock() + GOODBYE_SECONDS
    while core.connections and core.clock() < deadline:  # noqa: ASYNC110
        await asyncio.sleep(0.01)


def _load_hosted(settings: ServerSettings) -> Hosted:
    set_up_cpu(settings.threads)
    # All tensors: the server also hands edges their slice.
    return load_hosted(settings, fetch_model(settings.model, lambda name: True))


def _catch_signals(stop: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if stop.is_set():
            # Asked twice: whoever waits does not want to wait for a running pass either.
            os._exit(FORCED_EXIT)
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            loop.add_signal_handler(number, on_signal)
        except NotImplementedError:  # Windows
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(on_signal))
