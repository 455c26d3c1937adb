"""Refusals in the shape of OpenAI's API: {"error": {"message", "type", "param", "code"}} with the status that fits."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import Response

from split_llama.errors import (
    BadRequest,
    ContextExceeded,
    DeadlineExceeded,
    FlLlamaError,
    ServerUnreachable,
    UsageError,
)

UNREACHABLE_RETRY_MS = 5000


class ApiError(BadRequest):
    """A request that cannot be answered as it is; `param` names the field, `reason` is OpenAI's code for programs."""

    def __init__(
        self,
        message: str,
        *,
        retry_after_ms: int = 0,
        param: str | None = None,
        reason: str | None = None,
        http_status: int = 400,
    ) -> None:
        super().__init__(message, retry_after_ms=retry_after_ms)
        self.param = param
        self.reason = reason
        self.http_status = http_status


def unsupported(name: str, advice: str) -> ApiError:
    """Refuse a field that is known, but not served here."""
    return ApiError(f"{name} is not supported here: {advice}", param=name, reason="unsupported_parameter")


def no_such_model(name: str, served: str) -> ApiError:
    """Refuse a request for another model."""
    return ApiError(
        f"the model {name!r} does not exist here; this gateway serves {served!r}",
        param="model",
        reason="model_not_found",
        http_status=404,
    )


def describe(error: FlLlamaError) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Give status, JSON body and headers that tell a caller about `error`."""
    status, kind, reason = _classify(error)
    param = error.param if isinstance(error, ApiError) else None
    headers = {}
    retry_ms = error.retry_after_ms
    if not retry_ms and isinstance(error, ServerUnreachable):
        retry_ms = UNREACHABLE_RETRY_MS
    if retry_ms and status in (429, 503):
        headers["Retry-After"] = str(max(1, -(-retry_ms // 1000)))
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, DeadlineExceeded):
        # The openai package would ask for the same long answer twice more.
        headers["x-should-retry"] = "false"
    return status, error_body(error.message, kind, param, reason), headers


def _classify(error: FlLlamaError) -> tuple[int, str, str | None]:
    match error:
        case ApiError():
            kind = "authentication_error" if error.http_status == 401 else "invalid_request_error"
            return error.http_status, kind, error.reason
        case ContextExceeded():
            return 400, "invalid_request_error", "context_length_exceeded"
        case UsageError() if error.status == 400:
            return 400, "invalid_request_error", None
        case DeadlineExceeded():
            return 504, "timeout_error", "deadline_exceeded"
        case _ if error.status == 429:
            return 429, "rate_limit_error", "rate_limit_exceeded"
        case _ if error.status == 503:
            return 503, "server_error", "overloaded"
        case _:
            # Whatever else the server says is no fault of the caller's: its 401 is about the edge's own key.
            return 502, "server_error", "upstream_error"


def error_body(message: str, kind: str, param: str | None = None, reason: str | None = None) -> dict[str, Any]:
    """Give OpenAI's error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": reason}}


def json_response(body: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Answer with JSON in ASCII: a message may quote what is no valid Unicode."""
    return Response(json.dumps(body), status, headers, media_type="application/json")


def error_response(error: FlLlamaError) -> Response:
    """Answer with a refusal."""
    status, body, headers = describe(error)
    return json_response(body, status, headers)
