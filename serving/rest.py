"""REST: health, metrics, the model, the edge's weight slice, sessions and keys. JSON throughout."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from serving.admission import server_version
from serving.core import Core
from serving.keys import Principal
from serving.registry import Entry
from serving.slices import RangeNotSatisfiable, parse_range, read_range
from split_llama.config import Partition
from split_llama.wire.codec import Codec
from split_llama.wire.frame import VERSION

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def make_router(core: Core) -> APIRouter:
    """All REST routes. Health, version and metrics need no key."""
    router = APIRouter()

    @router.get("/health", tags=["health"], summary="The process is alive and its engine works")
    @router.get("/healthz", tags=["health"], include_in_schema=False)
    async def health() -> Response:
        return _status(core.is_healthy, {"status": core.stage.value})

    @router.get("/readyz", tags=["health"], summary="The model is loaded and new sessions are taken")
    async def ready() -> Response:
        return _status(core.is_ready, {"status": core.stage.value})

    @router.get("/version", tags=["health"])
    async def version() -> dict[str, Any]:
        return {"version": server_version(), "protocol": VERSION}

    @router.get("/metrics", tags=["health"], response_class=Response, summary="Prometheus metrics")
    async def metrics() -> Response:
        return Response(core.metrics.render(), media_type=METRICS_TYPE)

    router.include_router(_models(core), prefix="/v1", tags=["models"])
    router.include_router(_sessions(core), prefix="/v1", tags=["sessions"])
    return router


def _status(good: bool, body: dict[str, Any]) -> Response:
    return JSONResponse(body, status_code=200 if good else 503)


def _authenticator(core: Core) -> Any:
    async def authenticate(authorization: Annotated[str | None, Header()] = None) -> Principal:
        return core.keys.authenticate(authorization)

    return Depends(authenticate)


def _models(core: Core) -> APIRouter:
    router = APIRouter(dependencies=[_authenticator(core)])

    @router.get("/models", summary="The served model and its adapters, in OpenAI's list shape")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": list_models(core)}

    @router.get("/model", summary="What is hosted, and what an edge needs to know before it connects")
    async def model() -> dict[str, Any]:
        return describe(core)

    @router.get("/model/edge", summary="The files that an edge of partition p,q needs, with digests")
    async def edge(p: Annotated[int, Query(ge=0)], q: Annotated[int, Query(ge=0)]) -> dict[str, Any]:
        manifest = await core.hosted.slices.manifest(Partition(p, q))
        return manifest.to_json()

    @router.get("/model/edge/files/{name}", response_class=Response, summary="One of those files; Range is honoured")
    @router.head("/model/edge/files/{name}", response_class=Response, include_in_schema=False)
    async def edge_file(
        name: str, p: Annotated[int, Query(ge=0)], q: Annotated[int, Query(ge=0)], request: Request
    ) -> Response:
        return await send_file(core, Partition(p, q), name, request)

    @router.get("/adapters/{name}/edge", response_class=Response, summary="What an edge of partition p,q needs of one")
    async def adapter(name: str, p: Annotated[int, Query(ge=0)], q: Annotated[int, Query(ge=0)]) -> Response:
        hosted, partition = core.hosted, Partition(p, q)
        hosted.slices.check(partition)
        data = await asyncio.to_thread(hosted.adapters.edge_part, name, partition, hosted.name)
        return Response(data, media_type="application/octet-stream")

    return router


def list_models(core: Core) -> list[dict[str, Any]]:
    """Give the entries of `GET /v1/models`; as in vLLM, an adapter's `parent` is the model it belongs to."""
    hosted = core.hosted
    common = {
        "object": "model",
        "created": core.started,
        "owned_by": "fl-llama",
        "max_model_len": hosted.max_model_len,
    }
    base = {"id": hosted.name, **common, "root": hosted.name, "parent": None}
    return [base, *({"id": name, **common, "root": name, "parent": hosted.name} for name in hosted.adapters.names)]


def _sessions(core: Core) -> APIRouter:
    router = APIRouter()
    authenticate = _authenticator(core)

    @router.get("/sessions", summary="Your own sessions")
    async def sessions(principal: Principal = authenticate) -> dict[str, Any]:
        own = [entry for entry in core.registry if entry.owner == principal.owner]
        return {"object": "list", "data": [_describe_session(core, entry) for entry in own]}

    @router.delete("/sessions/{ident}", status_code=204, response_class=Response, summary="Close one of them")
    async def close(ident: str, principal: Principal = authenticate) -> Response:
        core.remove(core.find_own(ident, principal))
        return Response(status_code=204)

    @router.get("/key", summary="Your key's limits and use")
    async def key(principal: Principal = authenticate) -> dict[str, Any]:
        limits = principal.limits
        return {
            "name": principal.owner,
            "sessions": core.registry.count(principal.owner),
            "max_sessions": limits.max_sessions,
            "max_tokens_per_minute": limits.max_tokens_per_minute,
        }

    return router


def describe(core: Core) -> dict[str, Any]:
    """Give the body of `GET /v1/model`."""
    hosted = core.hosted
    return {
        "id": hosted.name,
        "config": dict(hosted.checkpoint.raw_config),
        "geometry": hosted.geometry,
        "blocks": [hosted.blocks.start, hosted.blocks.stop],
        "allowed_partition": [hosted.allowed.p, hosted.allowed.q],
        "hidden_size": hosted.config.hidden_size,
        "num_hidden_layers": hosted.config.num_hidden_layers,
        "dtype": hosted.dtype_name,
        "quantization": hosted.numerics.quantization,
        "max_model_len": hosted.max_model_len,
        "max_num_seqs": hosted.max_num_seqs,
        "codecs": [codec.label for codec in Codec],
        "max_frame_bytes": hosted.max_frame_bytes,
        "page_size": hosted.pages.page_size,
        "adapters": hosted.adapters.describe(),
        "version": server_version(),
    }


def _describe_session(core: Core, entry: Entry) -> dict[str, Any]:
    session, now = entry.session, core.clock()
    return {
        "id": entry.ident,
        "blocks": [entry.blocks.start, entry.blocks.stop],
        "adapter": core.hosted.adapters.name(session.sequence.adapter),
        "length": session.settled.length,
        "seq": session.applied,
        "state": session.phase.value,
        "connected": entry.mailbox is not None,
        "pages": len(session.sequence.block_table),
        "age_seconds": round(now - entry.opened_at, 3),
        "idle_seconds": round(now - entry.active_at, 3),
    }


async def send_file(core: Core, partition: Partition, name: str, request: Request) -> Response:
    """Answer for one file of a slice: 200, 206 for a range, 304 for a matching If-None-Match, 416 outside the file.

    The ETag is the file's SHA-256, so a range that an edge resumes is never of another version (If-Range).
    """
    slices = core.hosted.slices
    file = await slices.file(partition, name)
    tag = f'"{file.sha256}"'
    headers = {"ETag": tag, "Accept-Ranges": "bytes", "Cache-Control": "private, max-age=3600"}
    if request.headers.get("if-none-match") in (tag, "*"):
        return Response(status_code=304, headers=headers)
    wanted = request.headers.get("range")
    if request.headers.get("if-range") not in (None, tag):
        wanted = None
    try:
        part = parse_range(wanted, file.size)
    except RangeNotSatisfiable:
        return Response(status_code=416, headers=headers | {"Content-Range": f"bytes */{file.size}"})
    start, stop = (part.start, part.stop) if part is not None else (0, file.size)
    headers["Content-Length"] = str(stop - start)
    if part is not None:
        headers["Content-Range"] = part.content_range
    status = 206 if part is not None else 200
    media_type = "application/octet-stream"
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type=media_type)
    pieces = read_range(slices.slice(partition), name, start, stop)
    return StreamingResponse(pieces, status_code=status, headers=headers, media_type=media_type)
