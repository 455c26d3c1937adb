"""The one shape of REST errors: {"error": {"code", "type", "message"}} with the class's status."""

from __future__ import annotations

from fastapi.responses import JSONResponse

from split_llama.errors import FlLlamaError


def error_response(error: FlLlamaError) -> JSONResponse:
    """Build the answer for a refusal; Retry-After is in whole seconds, at least one."""
    headers = {}
    if error.retry_after_ms:
        headers["Retry-After"] = str(max(1, -(-error.retry_after_ms // 1000)))
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    body = {"error": {"code": error.code, "type": type(error).__name__, "message": error.message}}
    return JSONResponse(body, status_code=error.status, headers=headers)
