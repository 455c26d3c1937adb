"""Who may talk to the gateway: its names, web pages that may use it, keys, and how much may be sent.

One layer around the whole application, so that HTTP and WebSocket requests pass the same checks. Host is checked
against DNS rebinding (a page of somebody's that makes its own name point here), Origin against pages elsewhere.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Collection, Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edge_client.gateway.chat_messages import key_of
from edge_client.gateway.errors import ApiError, error_response
from edge_client.gateway.owner import OWNER, digest_of
from edge_client.gateway.settings import WILDCARD, GatewaySettings

MAX_BODY_BYTES = 16 * 2**20
# A length with more is too large, and with thousands more Python does not read it.
MAX_LENGTH_DIGITS = 20
TOO_LARGE = f"the request is larger than {MAX_BODY_BYTES // 2**20} MiB"
PREFLIGHT_SECONDS = "600"
POLICY_VIOLATION = 1008
BEARER = "bearer "


class Guard:
    """ASGI middleware. `open_paths` may be read without a key."""

    def __init__(
        self, app: ASGIApp, settings: GatewaySettings, keys: Sequence[str], open_paths: Collection[str]
    ) -> None:
        self._app = app
        self._settings = settings
        self._digests = [digest_of(key) for key in keys]
        self._open_paths = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse the request, or let it pass."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        is_foreign = origin is not None and not _is_of(origin, headers)
        # An allowed page elsewhere may read refusals as well.
        answering = _with_cors(send, origin) if origin and is_foreign and self._is_allowed(origin) else send
        try:
            self._check_host(headers)
            if origin is not None and is_foreign:
                self._check_origin(origin)
                if _is_preflight(scope, headers):
                    await _allow(headers)(scope, receive, answering)
                    return
            owner = self._check_key(scope, headers)
            _check_size(headers)
        except ApiError as error:
            await _refuse(error, scope, receive, answering)
            return
        bounded = _bounded(receive) if scope["type"] == "http" else receive
        await self._app({**scope, OWNER: owner}, bounded, answering)

    def _check_host(self, headers: Headers) -> None:
        host = headers.get("host", "")
        name = urlsplit(f"//{host}").hostname or "" if _is_plain(host) else ""
        allowed = self._settings.allowed_hosts
        if WILDCARD in allowed or name in allowed or self._is_own_name(name):
            return
        raise ApiError(
            f"this gateway does not answer to the name {name!r}; start it with --allowed-hosts {name or 'NAME'}",
            reason="host_not_allowed",
            http_status=403,
        )

    def _is_own_name(self, name: str) -> bool:
        if name == "localhost" or name.endswith(".localhost") or name == self._settings.host:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        # Nobody's DNS points at a bare address; on the network this machine has several.
        return address.is_loopback or not self._settings.is_loopback

    def _is_allowed(self, origin: str) -> bool:
        allowed = self._settings.allowed_origins
        return WILDCARD in allowed or origin.lower() in allowed

    def _check_origin(self, origin: str) -> None:
        if self._is_allowed(origin):
            return
        raise ApiError(
            f"pages of {origin} may not use this gateway; start it with --allowed-origins {origin}",
            reason="origin_not_allowed",
            http_status=403,
        )

    def _check_key(self, scope: Scope, headers: Headers) -> str:
        """Give the owner of what the request makes: the hash of its key, or "" where none is needed."""
        is_open = scope["path"] in self._open_paths and scope.get("method") in ("GET", "HEAD")
        if not self._digests or is_open:
            return ""
        given = headers.get("authorization", "")
        key = given[len(BEARER) :].strip() if given[: len(BEARER)].lower() == BEARER else None
        if key is None and scope["type"] == "websocket":
            key = key_of(scope.get("subprotocols", []))
        digest = digest_of(key or "")
        # Every key is compared, so that the time tells nothing.
        if not sum(hmac.compare_digest(digest, known) for known in self._digests):
            raise ApiError(
                "no key, or an unknown one: send Authorization: Bearer KEY with a key of this gateway's",
                reason="invalid_api_key",
                http_status=401,
            )
        return digest.hex()


def _is_of(origin: str, headers: Headers) -> bool:
    """Say whether a page is this gateway's own."""
    return _is_plain(origin) and urlsplit(origin).netloc.lower() == headers.get("host", "").lower()


def _is_plain(text: str) -> bool:
    """Say whether `urlsplit` can read it: it raises for brackets without a pair."""
    try:
        urlsplit(text if "://" in text else f"//{text}")
    except ValueError:
        return False
    return True


def _is_preflight(scope: Scope, headers: Headers) -> bool:
    return scope.get("method") == "OPTIONS" and "access-control-request-method" in headers


def _allow(headers: Headers) -> Response:
    allowed = {
        "Access-Control-Allow-Methods": "GET, POST, OPTIONS",
        "Access-Control-Allow-Headers": headers.get("access-control-request-headers", "authorization, content-type"),
        "Access-Control-Max-Age": PREFLIGHT_SECONDS,
    }
    return Response(status_code=204, headers=allowed)


def _with_cors(send: Send, origin: str) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["Access-Control-Allow-Origin"] = origin
            headers.add_vary_header("Origin")
        await send(message)

    return sending


def _check_size(headers: Headers) -> None:
    length = headers.get("content-length", "0")
    if length.isascii() and length.isdigit() and (len(length) > MAX_LENGTH_DIGITS or int(length) > MAX_BODY_BYTES):
        raise ApiError(TOO_LARGE, reason="http_413", http_status=413)


def _bounded(receive: Receive) -> Receive:
    """Count a body whose length was not announced."""
    seen = 0

    async def receiving() -> Message:
        nonlocal seen
        message = await receive()
        if message["type"] == "http.request":
            seen += len(message.get("body", b""))
            if seen > MAX_BODY_BYTES:
                # FastAPI takes anything else for a fault of the body's content.
                raise HTTPException(413, TOO_LARGE)
        return message

    return receiving


async def _refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket" and "websocket.http.response" not in scope.get("extensions", {}):
        await send({"type": "websocket.close", "code": POLICY_VIOLATION, "reason": error.message[:120]})
        return
    await error_response(error)(scope, receive, send)
