"""Names, origins and keys, for HTTP and WebSocket alike."""

from __future__ import annotations

import base64
import hashlib
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from edge_client.gateway.guard import Guard
from edge_client.gateway.owner import owner_of
from edge_client.gateway.settings import GatewaySettings
from tests.conftest import TinyCheckpoint
from tests.edge_client.gateway.conftest import StartGateway


async def _answer(request: Request) -> PlainTextResponse:
    return PlainTextResponse("in")


async def _chat(websocket: WebSocket) -> None:
    await websocket.accept()
    await websocket.send_text("in")
    await websocket.close()


def client(keys: tuple[str, ...] = (), host: str = "127.0.0.1", **settings: Any) -> TestClient:
    routes = [Route("/v1/models", _answer, methods=["GET", "POST"]), Route("/health", _answer, methods=["GET", "POST"])]
    app = Starlette(routes=[*routes, WebSocketRoute("/ws", _chat)])
    guard = Guard(app, GatewaySettings(host=host, **settings), keys, ["/health"])
    return TestClient(guard, base_url="http://127.0.0.1:8000")


def connects(http: TestClient, **options: Any) -> bool:
    try:
        with http.websocket_connect("ws://127.0.0.1:8000/ws", **options) as websocket:
            return websocket.receive_text() == "in"
    except WebSocketDisconnect:
        return False
    except httpx.HTTPStatusError:
        return False


@pytest.mark.parametrize(
    ("host", "settings", "is_let_in"),
    [
        ("127.0.0.1:8000", {}, True),
        ("localhost:8000", {}, True),
        ("LOCALHOST", {}, True),
        ("chat.localhost", {}, True),
        ("[::1]:8000", {}, True),
        ("127.9.9.9", {}, True),
        ("evil.example", {}, False),
        ("evil.example:8000", {}, False),
        ("127.0.0.1.evil.example", {}, False),
        ("localhost.evil.example", {}, False),
        ("evil.example#localhost", {}, False),
        ("evil.example@localhost", {}, True),  # urlsplit reads a user name; a browser never sends one
        ("[::1", {}, False),
        ("", {}, False),
        ("192.168.1.7", {}, False),
        ("192.168.1.7", {"host": "0.0.0.0"}, True),
        ("evil.example", {"host": "0.0.0.0"}, False),
        ("chat.example", {"allowed_hosts": ("chat.example",)}, True),
        ("evil.example", {"allowed_hosts": ("chat.example",)}, False),
        ("anything", {"allowed_hosts": ("*",)}, True),
        ("box.lan", {"host": "box.lan"}, True),
        ("Box.LAN", {"host": "box.lan"}, True),
        ("box.lan", {"host": "Box.LAN"}, True),
        ("chat.example", {"allowed_hosts": ("Chat.Example",)}, True),
    ],
)
def test_host(host: str, settings: dict[str, Any], is_let_in: bool) -> None:
    http = client(**settings)
    reply = http.get("/v1/models", headers={"Host": host})
    assert reply.status_code == (200 if is_let_in else 403)
    if not is_let_in:
        assert reply.json()["error"]["code"] == "host_not_allowed"
        assert "--allowed-hosts" in reply.json()["error"]["message"]
    assert connects(http, headers={"Host": host}) == is_let_in


@pytest.mark.parametrize(
    ("origin", "settings", "is_let_in"),
    [
        ("http://127.0.0.1:8000", {}, True),
        ("https://127.0.0.1:8000", {}, True),  # behind a proxy that speaks TLS
        ("http://127.0.0.1:9000", {}, False),
        ("http://localhost:8000", {}, False),
        ("https://evil.example", {}, False),
        ("null", {}, False),
        ("http://[::1", {}, False),
        ("https://chat.example", {"allowed_origins": ("https://chat.example",)}, True),
        ("https://chat.example.evil.example", {"allowed_origins": ("https://chat.example",)}, False),
        ("https://chat.example", {"allowed_origins": ("https://Chat.Example",)}, True),
        ("https://any.example", {"allowed_origins": ("*",)}, True),
    ],
)
def test_origin(origin: str, settings: dict[str, Any], is_let_in: bool) -> None:
    http = client(**settings)
    reply = http.post("/v1/models", headers={"Origin": origin})
    assert reply.status_code == (200 if is_let_in else 403)
    is_foreign = "127.0.0.1:8000" not in origin
    allowed = reply.headers.get("access-control-allow-origin")
    assert allowed == (origin if is_let_in and is_foreign else None)
    assert connects(http, headers={"Origin": origin}) == is_let_in
    asking = {"Origin": origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-a, b"}
    before = http.options("/v1/models", headers=asking)
    if is_let_in and is_foreign:
        assert before.status_code == 204
        assert before.headers["access-control-allow-origin"] == origin
        assert before.headers["access-control-allow-headers"] == "x-a, b"
    else:
        assert "access-control-allow-origin" not in before.headers


@pytest.mark.parametrize(
    ("given", "is_let_in"),
    [
        ("Bearer one", True),
        ("bearer two", True),
        ("Bearer  one ", True),
        ("Bearer three", False),
        ("Bearer ", False),
        ("Bearer", False),
        ("one", False),
        ("Basic one", False),
        (None, False),
    ],
)
def test_keys(given: str | None, is_let_in: bool) -> None:
    http = client(keys=("one", "two"))
    headers = {} if given is None else {"Authorization": given}
    reply = http.get("/v1/models", headers=headers)
    assert reply.status_code == (200 if is_let_in else 401)
    if not is_let_in:
        assert reply.json()["error"]["code"] == "invalid_api_key"
        assert reply.headers["www-authenticate"] == "Bearer"
    assert connects(http, headers=headers) == is_let_in
    assert http.get("/health", headers=headers).status_code == 200
    assert http.post("/health", headers=headers).status_code == (200 if is_let_in else 401)
    assert http.get("/nowhere", headers=headers).status_code == (404 if is_let_in else 401)


def test_a_browsers_key_comes_as_a_subprotocol() -> None:
    http = client(keys=("one",))
    for key, is_let_in in (("one", True), ("two", False)):
        packed = base64.urlsafe_b64encode(key.encode()).decode().rstrip("=")
        assert connects(http, subprotocols=["fl-llama", f"key.{packed}"]) == is_let_in
        assert http.get("/v1/models", headers={"Sec-WebSocket-Protocol": f"key.{packed}"}).status_code == 401


def test_without_keys_everybody_gets_in() -> None:
    http = client()
    assert http.get("/v1/models", headers={"Authorization": "Bearer whatever"}).status_code == 200
    assert connects(http)


@pytest.mark.parametrize("length", [str(2**40), "9" * 5000])
def test_announced_sizes_are_refused_before_anything_is_read(length: str) -> None:
    reply = client().post("/v1/models", content=b"x", headers={"Content-Length": length})
    assert reply.status_code == 413


def test_an_allowed_page_elsewhere_may_read_refusals() -> None:
    http = client(keys=("one",), allowed_origins=("https://chat.example",))
    here, key = {"Origin": "https://chat.example"}, {"Authorization": "Bearer one"}
    refused = [
        (401, http.get("/v1/models", headers=here)),
        (403, http.get("/v1/models", headers=here | key | {"Host": "evil.example"})),
        (413, http.post("/v1/models", content=b"x", headers=here | key | {"Content-Length": str(2**40)})),
        (404, http.get("/nowhere", headers=here | key)),
    ]
    for status, reply in refused:
        assert reply.status_code == status
        assert reply.headers["access-control-allow-origin"] == "https://chat.example"
        assert "Origin" in reply.headers["vary"]
    other = http.get("/v1/models", headers={"Origin": "https://evil.example"})
    assert other.status_code == 403
    assert "access-control-allow-origin" not in other.headers


def test_the_owner_is_the_keys_hash() -> None:
    async def tell(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await PlainTextResponse(owner_of(scope))(scope, receive, send)
            return
        websocket = WebSocket(scope, receive, send)
        await websocket.accept()
        await websocket.send_text(owner_of(scope))
        await websocket.close()

    def asks(*keys: str) -> TestClient:
        return TestClient(Guard(tell, GatewaySettings(), keys, ["/health"]), base_url="http://127.0.0.1:8000")

    for key in ("one", "two"):
        expected = hashlib.sha256(key.encode()).hexdigest()
        packed = base64.urlsafe_b64encode(key.encode()).decode().rstrip("=")
        keyed = asks("one", "two")
        assert keyed.get("/", headers={"Authorization": f"Bearer {key}"}).text == expected
        with keyed.websocket_connect("ws://127.0.0.1:8000/", subprotocols=[f"key.{packed}"]) as websocket:
            assert websocket.receive_text() == expected
    assert keyed.get("/health", headers={"Authorization": "Bearer one"}).text == ""
    assert asks().get("/", headers={"Authorization": "Bearer one"}).text == ""


async def test_the_whole_gateway_is_behind_it(tiny_checkpoint: TinyCheckpoint, start_gateway: StartGateway) -> None:
    async with start_gateway(tiny_checkpoint(), gateway_key="secret") as gateway, gateway.http() as http:
        for path in ("/", "/health", "/version", "/metrics"):
            assert (await http.get(path)).status_code == 200, path
        for path in ("/v1/models", "/openapi.json", "/docs"):
            assert (await http.get(path)).status_code == 401, path
        reply = await http.post("/tokenize", json={"prompt": "x"})
        assert reply.status_code == 401
        key = {"Authorization": "Bearer secret"}
        assert (await http.post("/tokenize", json={"prompt": "x"}, headers=key)).status_code == 200
        assert (await http.get("/v1/models", headers=key | {"Host": "evil.example"})).status_code == 403
        page = await http.get("/")
        assert page.headers["content-security-policy"].startswith("default-src 'self'")
        assert "unsafe" not in page.headers["content-security-policy"]
