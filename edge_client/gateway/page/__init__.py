"""The chat page: static files, served with the headers that hold it to this origin. No build step."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fastapi import APIRouter, Request, Response

FOLDER = Path(__file__).parent
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
HEADERS = {
    # No inline script or style, no request to anybody else, in nobody's frame.
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "object-src 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    # Asked again at every load (a 304 costs nothing): modules of two versions must not meet.
    "Cache-Control": "no-cache",
}


def router() -> APIRouter:
    """Give the page at `/` and its files beside it. They hold no secret: the page that asks for a key comes without."""
    routes = APIRouter(include_in_schema=False)
    for path in sorted(FOLDER.iterdir()):
        if path.suffix in MEDIA_TYPES:
            _add(routes, "/" if path.name == "index.html" else f"/{path.name}", path)
    return routes


def _add(routes: APIRouter, address: str, path: Path) -> None:
    content = path.read_bytes()
    headers = {**HEADERS, "ETag": f'"{hashlib.sha256(content).hexdigest()[:20]}"'}

    @routes.api_route(address, methods=["GET", "HEAD"])
    async def file(request: Request) -> Response:
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=MEDIA_TYPES[path.suffix], headers=headers)
