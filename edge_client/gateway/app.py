"""The FastAPI application around an `AnswerService`: OpenAI's routes, the chat, and one shape of errors."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from importlib.metadata import version as package_version
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edge_client.gateway import chat_socket, page
from edge_client.gateway.chat import chat
from edge_client.gateway.completions import complete
from edge_client.gateway.errors import error_body, error_response, json_response
from edge_client.gateway.guard import Guard
from edge_client.gateway.metrics import CONTENT_TYPE, GatewayMetrics
from edge_client.gateway.requests import ChatRequest, CompletionRequest
from edge_client.gateway.service import AnswerService
from edge_client.gateway.settings import GatewaySettings
from edge_client.gateway.tokens import DetokenizeRequest, TokenizeRequest, describe_tokenizer, detokenize, tokenize
from split_llama.errors import FlLlamaError

NO_KEY_NEEDED = ("/health", "/version", "/metrics")
FIELD = re.compile(r"[a-z_]+")
PACKAGE = "fl-llama"

log = logging.getLogger("fl_llama.gateway")


def create_app(service: AnswerService, settings: GatewaySettings, keys: Sequence[str]) -> ASGIApp:
    """Build the application, guarded. Its life is the service's, not its own."""
    app = FastAPI(
        title="FL-LLaMA edge gateway",
        version=package_version(PACKAGE),
        description="OpenAI's API at the edge. docs/gateway.md says what is served, docs/chat.md has the WebSocket.",
        # Their pages come from elsewhere on the web; the description itself is at /openapi.json.
        docs_url=None,
        redoc_url=None,
    )
    pages = page.router()
    app.include_router(_openai(service, settings))
    app.include_router(_others(service))
    app.include_router(chat_socket.router(service))
    app.include_router(pages)
    _add_handlers(app)
    open_paths = {*NO_KEY_NEEDED, *(getattr(route, "path", "") for route in pages.routes)}
    return Guard(_Counted(app, service.metrics), settings, keys, open_paths)


def _openai(service: AnswerService, settings: GatewaySettings) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["OpenAI"])
    model = {
        "id": service.model,
        "object": "model",
        "created": service.started,
        "owned_by": "fl-llama",
        "root": service.model,
        "max_model_len": service.edge.max_length,
    }

    @router.get("/models", summary="The model served")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @router.get("/models/{name:path}", summary="The same by its name")
    async def one_model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return model

    @router.post("/completions", summary="Continue or score a prompt", response_class=Response)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        service.check_model(body.model)
        return await complete(service, settings, body, request)

    @router.post("/chat/completions", summary="The next message of a conversation", response_class=Response)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        service.check_model(body.model)
        return await chat(service, settings, body, request)

    return router


def _others(service: AnswerService) -> APIRouter:
    router = APIRouter()

    @router.post("/tokenize", tags=["tokens"], response_class=Response)
    async def to_ids(body: TokenizeRequest) -> Response:
        service.check_model(body.model)
        return json_response(await service.blocking.run(lambda: tokenize(service, body)))

    @router.post("/detokenize", tags=["tokens"], response_class=Response)
    async def to_text(body: DetokenizeRequest) -> Response:
        service.check_model(body.model)
        return json_response(await service.blocking.run(lambda: detokenize(service, body)))

    @router.get("/tokenizer_info", tags=["tokens"], response_class=Response)
    async def tokenizer_info() -> Response:
        return json_response(await service.blocking.run(lambda: describe_tokenizer(service)))

    @router.get("/health", tags=["health"], summary="The gateway can answer; 503 while its server is lost")
    async def health() -> dict[str, Any]:
        if service.edge.error is not None:
            raise service.edge.error
        return {"status": "ok"}

    @router.get("/version", tags=["health"])
    async def version() -> dict[str, Any]:
        return {"version": package_version(PACKAGE)}

    @router.get("/metrics", tags=["health"], response_class=Response, summary="Prometheus metrics")
    async def metrics() -> Response:
        return Response(service.metrics.render(), media_type=CONTENT_TYPE)

    return router


def _add_handlers(app: FastAPI) -> None:
    @app.exception_handler(FlLlamaError)
    async def refused(request: Request, error: FlLlamaError) -> Response:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return invalid_response(error, request.headers.get("content-type", ""))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        body = error_body(message, "invalid_request_error", reason=f"http_{error.status_code}")
        return json_response(body, error.status_code, dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        # Starlette raises it again behind this answer, for the log.
        message = "the gateway failed while it answered; its log says more"
        return json_response(error_body(message, "server_error"), 500)


def invalid_response(error: RequestValidationError, content_type: str) -> Response:
    """Say which field cannot be used and why, as OpenAI does: the first one in `param`, up to five in words."""
    faults = error.errors()
    if faults[0]["type"] == "json_invalid":
        reason = faults[0].get("ctx", {}).get("error", "")
        return json_response(
            error_body(f"the body is no JSON: {reason}", "invalid_request_error", reason="bad_json"), 400
        )
    if faults[0]["loc"] == ("body",):
        kind = content_type.split(";")[0] or "nothing"
        hint = "" if kind.endswith("json") else f"; it came as {kind}, say Content-Type: application/json"
        return json_response(error_body(f"the body must be a JSON object{hint}", "invalid_request_error"), 400)
    said: dict[str, list[str]] = {}
    for fault in faults:
        said.setdefault(_place(fault["loc"]), []).append(fault["msg"])
    message = "; ".join(f"{place}: {', or: '.join(reasons)}" for place, reasons in list(said.items())[:5])
    return json_response(
        error_body(f"the request is not valid: {message}", "invalid_request_error", next(iter(said))), 400
    )


def _place(parts: Sequence[int | str]) -> str:
    """Name a field without the branches of unions that pydantic tried on the way."""
    names = [str(part) for part in parts[1:] if isinstance(part, int) or FIELD.fullmatch(part)]
    return ".".join(name for name in names if name not in ("str", "int"))


class _Counted:
    """Counts what is answered, by route. Unknown paths count together: they are the callers' words."""

    def __init__(self, app: ASGIApp, metrics: GatewayMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "other")
                self._metrics.requests.labels(route, str(message["status"])).inc()
            await send(message)

        await self._app(scope, receive, counting if scope["type"] == "http" else send)
