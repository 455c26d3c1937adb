"""What can go wrong with a link, as our exceptions: who to blame, and what to check."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
from collections.abc import Iterator
from typing import Any

from split_llama.errors import (
    FlLlamaError,
    NotAServer,
    ServerUnreachable,
    Unauthenticated,
    UsageError,
    all_errors,
    error_for_code,
)

GATEWAY_STATUSES = frozenset({502, 503, 504})


def unreachable(url: str, failure: BaseException) -> FlLlamaError:
    """Turn a failure below HTTP (name, route, timeout, TLS) into `ServerUnreachable` that says what to check."""
    causes = list(_chain(failure))
    for cause in causes:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return ServerUnreachable(
                f"{url}: the server's certificate is not trusted ({cause.verify_message}); "
                "check the host name, the clock, and the CA file"
            )
        if isinstance(cause, ssl.SSLError):
            return ServerUnreachable(f"{url}: TLS failed ({cause.reason or cause}); does the server speak https there?")
        if isinstance(cause, socket.gaierror):
            return ServerUnreachable(f"{url}: the host name cannot be resolved; check its spelling and your DNS")
        if isinstance(cause, ConnectionRefusedError):
            return ServerUnreachable(f"{url}: nothing listens there; is split-server running, is the port right?")
    if any(isinstance(cause, TimeoutError) for cause in causes) or "Timeout" in type(failure).__name__:
        return ServerUnreachable(f"{url}: no answer in time; check the address, firewalls and proxy settings")
    detail = str(failure) or type(failure).__name__
    return ServerUnreachable(f"{url}: the connection failed ({detail}); check the network and proxy settings")


@contextlib.contextmanager
def proxy_errors(url: str) -> Iterator[None]:
    """Turn what an HTTP client says at its making about the proxies of the environment into `UsageError`."""
    try:
        yield
    except (ImportError, ValueError) as failure:
        raise UsageError(f"{url}: the proxy of the environment cannot be used: {failure}") from failure


def refused(url: str, status: int, content_type: str, body: bytes, retry_after: str = "") -> FlLlamaError:
    """Turn an HTTP answer that is not the one hoped for into an exception; `retry_after` is that header, in seconds.

    A split-server's JSON error becomes the exception it names. Without one, 401 and 403 are `Unauthenticated`, a
    gateway's 502, 503 and 504 are `ServerUnreachable` (trying again may help) and all else is `NotAServer`.
    """
    retry_after_ms = 1000 * int(retry_after) if retry_after.isascii() and retry_after.isdigit() else 0
    if (error := _own_error(body, retry_after_ms)) is not None:
        return error
    if status in (401, 403):
        return Unauthenticated(f"{url} answered {status}: the API key is missing or unknown; give one with --api-key")
    if status in GATEWAY_STATUSES:
        message = f"{url}: a proxy in between answered {status}: the server behind it is down or busy"
        return ServerUnreachable(message, retry_after_ms=retry_after_ms)
    page = "a web page" if "html" in content_type.lower() else "something else"
    hint = "a login page of this network (captive portal), a proxy, or another program on that port"
    return NotAServer(f"{url} answered {status} with {page}, no split-server's answer: perhaps {hint}")


def not_http(url: str) -> FlLlamaError:
    """Give the exception for a peer that answers, but no HTTP."""
    return NotAServer(f"{url}: what answers there does not speak HTTP; is the port right, should it be https?")


def _own_error(body: bytes, retry_after_ms: int) -> FlLlamaError | None:
    """Read `{"error": {"code", "type", "message"}}`; `None` when the body is not that."""
    try:
        parsed: Any = json.loads(body)
        error = parsed["error"]
        code, name, message = error["code"], error["type"], error["message"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    known = {cls.code: cls.__name__ for cls in all_errors()}
    if not isinstance(code, int) or known.get(code) != name or not isinstance(message, str):
        return None
    return error_for_code(code, message, retry_after_ms)


def _chain(failure: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while failure is not None and id(failure) not in seen:
        seen.add(id(failure))
        yield failure
        failure = failure.__cause__ or failure.__context__
