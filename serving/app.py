"""The FastAPI application around a `Core`."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from serving import dataplane, rest
from serving.admission import server_version
from serving.core import Core
from serving.replies import error_response
from split_llama.errors import BadRequest, FlLlamaError


def create_app(core: Core) -> FastAPI:
    """Build the application: REST, the data plane and one shape of errors. Its life is the core's, not its own."""
    app = FastAPI(
        title="FL-LLaMA split-server",
        version=server_version(),
        description="Hosts the middle blocks of a model. The frames on /v1/stream are described in docs/protocol.md.",
        root_path=core.settings.root_path,
    )
    app.include_router(rest.make_router(core))
    app.include_router(dataplane.make_router(core))
    for router in core.extensions.routers():
        app.include_router(router)

    @app.exception_handler(FlLlamaError)
    async def refused(request: Request, error: FlLlamaError) -> JSONResponse:
        core.count_refusal(error)
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()[:5])
        return error_response(BadRequest(f"the request is not valid: {faults}"))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        body = {"error": {"code": 0, "type": "HTTPException", "message": str(error.detail)}}
        return JSONResponse(body, status_code=error.status_code, headers=error.headers)

    return app
