"""A gateway with nothing behind it: the real page and chat socket over a service that answers as the question says.

The last line of the last user message says what comes, so that a test reads as what it checks:

    say WORDS            the words, one token each, as fast as can be
    count N every S      "1 2 3 ...", S seconds between them
    count N              the same, 1/100 s between them
    fail NAME            that error of `split_llama.errors` before the first token
    break NAME           the same after two tokens
    fill N               tokens of 8 KiB
    system               what the system message says
    settings             the parameters the gateway got
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from live_server import free_port

from edge_client.gateway import page
from edge_client.gateway.chat_messages import key_of
from edge_client.gateway.chat_socket import router
from edge_client.settings import EdgeSettings
from edge_client.turn import GenerationParams, TokenEvent
from split_llama import errors
from split_llama.errors import FlLlamaError
from split_llama.noise import NoiseSpec

Message = dict[str, Any]
# Its older implementation warns of its own age.
WEBSOCKETS: Any = "websockets-sansio"


@dataclass
class FakeStats:
    prompt_tokens: int = 0
    cached_tokens: int = 0
    round_trips: int = 0
    ttft_ms: float = 0.0
    total_ms: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    rows_up: int = 0
    drafted: int = 0
    accepted: int = 0


class FakeAnswer:
    """One answer; a token is a round trip of one row with 300 bytes either way, and takes 10 ms by its own count."""

    def __init__(self, script: Script, prompt: int) -> None:
        self.turn = SimpleNamespace(tokens=[], finish_reason=None)
        self.stats = FakeStats(prompt_tokens=prompt, rows_up=prompt, bytes_up=300 * prompt)
        self._script = script

    async def events(self) -> AsyncIterator[TokenEvent]:
        words = self._script.words
        for number, word in enumerate(words):
            if number or self._script.pause:
                await asyncio.sleep(self._script.pause)
            if self._script.error is not None and number == 2:
                raise self._script.error
            self._count()
            self.turn.finish_reason = "stop" if number == len(words) - 1 else None
            yield TokenEvent(number, word, self.turn.finish_reason)

    def _count(self) -> None:
        stats = self.stats
        self.turn.tokens.append(len(self.turn.tokens))
        stats.round_trips += 1
        stats.ttft_ms = stats.ttft_ms or 10.0
        stats.total_ms += 10.0
        stats.bytes_down += 300
        if len(self.turn.tokens) > 1:
            stats.rows_up += 1
            stats.bytes_up += 300


@dataclass
class Script:
    words: list[str]
    pause: float = 0.0
    error: FlLlamaError | None = None
    fails_at_once: bool = False


class FakeService:
    """Stands for `AnswerService`; `begun` and `ended` count its answers."""

    def __init__(self, model: str = "demo") -> None:
        self.settings = EdgeSettings(server="http://127.0.0.1:8700")
        self.edge: Any = FakeEdge()
        self.model = model
        self.begun = 0
        self.ended = 0
        self._scripts: dict[int, Script] = {}

    def chat_ids(self, messages: Sequence[Message]) -> list[int]:
        """Ids that stand for the conversation: its number, then one for each word of it."""
        number = len(self._scripts)
        self._scripts[number] = read_script(messages)
        return [number, *range(sum(len(message["content"].split()) for message in messages))]

    async def prepare(self, work: Callable[[], list[int]]) -> list[int]:
        return work()

    @contextlib.asynccontextmanager
    async def answer(self, ids: Sequence[int], params: GenerationParams, *, owner: str = "") -> AsyncIterator[Any]:
        script = self._scripts[ids[0]]
        if script.words == ["settings"]:
            script = Script([repr(params)])
        if script.fails_at_once and script.error is not None:
            raise script.error
        self.begun += 1
        try:
            yield FakeAnswer(script, len(ids))
        finally:
            self.ended += 1


@dataclass
class FakeEdge:
    max_length: int = 1024
    noise: NoiseSpec = field(default_factory=lambda: NoiseSpec(0.0251, 17.3))

    @property
    def source(self) -> Any:
        card = SimpleNamespace(num_hidden_layers=8, hidden_size=128)
        return SimpleNamespace(card=card, partition=SimpleNamespace(p=1, q=1))

    def params(self, **given: Any) -> Any:
        sampling = SimpleNamespace(temperature=given["temperature"] or 0.0, top_p=given["top_p"] or 1.0)
        return SimpleNamespace(sampling=sampling, **given)


def read_script(messages: Sequence[Message]) -> Script:
    line = messages[-1]["content"].rstrip().split("\n")[-1]
    verb, _, rest = line.partition(" ")
    match verb:
        case "count":
            count, _, pause = rest.partition(" every ")
            return Script([f"{number} " for number in range(1, int(count) + 1)], float(pause or 0.01))
        case "fail" | "break":
            error: FlLlamaError = getattr(errors, rest)(f"{rest}: the words of the gateway", retry_after_ms=1500)
            return Script(["one ", "two ", "three "], error=error, fails_at_once=verb == "fail")
        case "fill":
            return Script(["x" * 8192] * int(rest))
        case "system":
            return Script([message["content"] for message in messages if message["role"] == "system"] or ["none"])
        case "settings":
            return Script(["settings"])
        case _:
            text = messages[-1]["content"].removeprefix("say ")
            return Script([word + " " for word in text.split(" ")])


def make_app(service: FakeService, key: str | None = None) -> FastAPI:
    """The page, its socket and `/v1/models`, all but the page behind `key`."""
    app = FastAPI()
    app.include_router(router(service))
    app.include_router(page.router())

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        allowed = key is None or given == key
        return Response(json.dumps({"data": []}), 200 if allowed else 401)

    inner = app.middleware_stack = app.build_middleware_stack()

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket" and key is not None and key_of(scope["subprotocols"]) != key:
            await receive()
            await send({"type": "websocket.close", "code": 4404})
            return
        await inner(scope, receive, send)

    app.middleware_stack = guarded
    return app


class FakeGateway:
    """`make_app` on a port of its own, in a thread; it can be stopped and started again."""

    def __init__(self, key: str | None = None) -> None:
        self.service = FakeService()
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._key = key
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        config = uvicorn.Config(
            make_app(self.service, self._key), port=self.port, log_level="error", ws="websockets-sansio"
        )
        config.timeout_graceful_shutdown = 1
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive(), "the gateway did not start"

    def stop(self) -> None:
        """As when `edge-client serve` is stopped: connections go, nothing answers any more."""
        if self._server is not None and self._thread is not None:
            self._server.should_exit = True
            self._thread.join()
            self._server = None


@contextlib.contextmanager
def fake_gateway(key: str | None = None) -> Iterator[FakeGateway]:
    gateway = FakeGateway(key)
    gateway.start()
    try:
        yield gateway
    finally:
        gateway.stop()
