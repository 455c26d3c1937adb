"""A model hub on loopback: as much of its HTTP interface as fetching a model needs."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub:
    """Serves `repos` (name to folder). `token` guards all of them; `log` keeps (method, path, Range header).

    After `healthy_pieces` answers from its file store it is overloaded.
    """

    repos: dict[str, Path]
    token: str | None = None
    denial: tuple[int, str] = (403, "GatedRepo")
    ranges: bool = True
    healthy_pieces: int | None = None
    log: list[tuple[str, str, str | None]] = field(default_factory=list)
    url: str = ""

    @contextmanager
    def running(self) -> Iterator[FakeHub]:
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            thread.join()
            server.server_close()

    def bytes_sent(self, name: str) -> int:
        """Bytes of the file `name` that GET requests asked for (a request without Range asks for all)."""
        total = 0
        for method, path, wanted in self.log:
            if method == "GET" and path.endswith(name) and "/cdn/" in path:
                size = self._file(path.removeprefix("/cdn/").split("/", 2)).stat().st_size
                start, stop = _range(wanted, size) if self.ranges else (0, size)
                total += stop - start
        return total

    def overloaded(self) -> bool:
        """Count one more answer; say whether it is too many."""
        if self.healthy_pieces is None:
            return False
        self.healthy_pieces -= 1
        return self.healthy_pieces < 0

    def _file(self, parts: list[str]) -> Path:
        return self.repos["/".join(parts[:2])] / parts[2]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, *, with_body: bool) -> None:
        self.hub.log.append((self.command, self.path, self.headers.get("Range")))
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
        if self.path.startswith("/cdn/") and self.hub.overloaded():
            self._error(503, "")
        elif self.path.startswith("/cdn/"):
            self._content(self.hub._file(self.path.removeprefix("/cdn/").split("/", 2)), with_body=with_body)
        elif found is None or found[1] not in self.hub.repos:
            self._error(404, "RepoNotFound")
        elif self.hub.token is not None and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self._error(*self.hub.denial)
        elif not (self.hub.repos[found[1]] / found[3]).is_file():
            self._error(404, "EntryNotFound")
        elif found[3].endswith(".safetensors"):
            self._redirect(found[1], found[3])
        else:
            self._content(self.hub.repos[found[1]] / found[3], with_body=with_body)

    def _error(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _redirect(self, repo: str, name: str) -> None:
        file = self.hub.repos[repo] / name
        self.send_response(302)
        self.send_header("Location", f"{self.hub.url}/cdn/{repo}/{name}")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("X-Linked-Size", str(file.stat().st_size))
        self.send_header("X-Linked-Etag", f'"{hashlib.sha256(file.read_bytes()).hexdigest()}"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _content(self, file: Path, *, with_body: bool) -> None:
        body = file.read_bytes()
        start, stop = _range(self.headers.get("Range"), len(body)) if self.hub.ranges else (0, len(body))
        ranged = self.hub.ranges and self.headers.get("Range") is not None
        self.send_response(206 if ranged else 200)
        if ranged:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(body)}")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        if with_body:
            self.wfile.write(body[start:stop])


def _range(header: str | None, size: int) -> tuple[int, int]:
    found = re.fullmatch(r"bytes=(\d+)-(\d+)", header or "")
    return (0, size) if found is None else (int(found[1]), min(size, int(found[2]) + 1))
