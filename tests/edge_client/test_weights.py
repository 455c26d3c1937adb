"""Fetching the edge's slice: resumed, checked, pinned, cached, and shared by two processes."""

from __future__ import annotations

import contextlib
import errno
import http.server
import json
import stat
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from edge_client import weights
from edge_client.rest import RestClient
from edge_client.state_files import StateFolder
from edge_client.weights import Offer, ask_offer, check_pin, fetch_slice
from split_llama.checkpoint import Checkpoint
from split_llama.config import Partition
from split_llama.edge_slice import EdgeSlice
from split_llama.errors import CacheError, CheckpointError, NotAServer, PinMismatch, ServerUnreachable

PARTITION = Partition(1, 1)
WEIGHTS = "model.safetensors"


@dataclass
class SliceServer:
    """The REST routes of a slice, with faults to order."""

    checkpoint: Path
    url: str = ""
    requests: list[tuple[str, str]] = field(default_factory=list)
    cut_after: int | None = None
    corrupt: bool = False
    ranges: bool = True
    html: bool = False
    loading: int = 0

    def slice(self) -> EdgeSlice:
        return EdgeSlice(Checkpoint.open(self.checkpoint), PARTITION)

    def answer(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        path = handler.path.partition("?")[0]
        wanted = handler.headers.get("Range", "")
        self.requests.append((path.rpartition("/")[2], wanted))
        if self.html:
            send(handler, 200, b"<html>log in</html>", "text/html")
        elif self.loading:
            self.loading -= 1
            error = {"error": {"code": 31, "type": "ServerUnreachable", "message": "still loading"}}
            send(handler, 503, json.dumps(error).encode(), "application/json", {"Retry-After": "1"})
        elif path == "/v1/model/edge":
            send(handler, 200, json.dumps(self.slice().manifest().to_json()).encode(), "application/json")
        else:
            self.send_file(handler, path.rpartition("/")[2], wanted)

    def send_file(self, handler: http.server.BaseHTTPRequestHandler, name: str, wanted: str) -> None:
        content = b"".join(self.slice().read(name, 0, self.slice().sizes[name]))
        if self.corrupt and name == WEIGHTS:
            content = content[:-1] + bytes([content[-1] ^ 1])
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.ranges else 0
        rest = content[start:]
        cut, self.cut_after = (self.cut_after, None) if name == WEIGHTS else (None, self.cut_after)
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Type", "application/octet-stream")
        handler.send_header("Content-Length", str(len(rest)))
        handler.end_headers()
        handler.wfile.write(rest[:cut])
        if cut is not None:
            handler.close_connection = True


def send(
    handler: http.server.BaseHTTPRequestHandler,
    status: int,
    body: bytes,
    kind: str,
    headers: dict[str, str] | None = None,
) -> None:
    handler.send_response(status)
    for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)


@pytest.fixture
def server(tiny_checkpoint: Any) -> Iterator[SliceServer]:
    ours = SliceServer(tiny_checkpoint(hidden=64))

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            ours.answer(self)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        listening.daemon_threads = True
        threading.Thread(target=listening.serve_forever, args=(0.02,), daemon=True).start()
        ours.url = f"http://127.0.0.1:{listening.server_address[1]}"
        yield ours
        listening.shutdown()


@pytest.fixture
def rest(server: SliceServer) -> Iterator[RestClient]:
    client = RestClient(server.url)
    yield client
    client.close()


def assert_complete(folder: Path, server: SliceServer) -> None:
    ours = server.slice()
    for name, size in ours.sizes.items():
        assert (folder / name).read_bytes() == b"".join(ours.read(name, 0, size))


def test_fetched_once_then_cached(server: SliceServer, rest: RestClient, tmp_path: Path) -> None:
    offer = ask_offer(rest, PARTITION, "g")
    seen: list[tuple[int, int]] = []
    folder = fetch_slice(rest, offer, tmp_path, lambda present, total: seen.append((present, total)))
    assert_complete(folder, server)
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] == sum(server.slice().sizes.values())
    asked = len(server.requests)
    assert fetch_slice(rest, offer, tmp_path) == folder
    assert len(server.requests) == asked
    assert Checkpoint.open(folder).config.hidden_size == 64


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_download_goes_on(server: SliceServer, rest: RestClient, tmp_path: Path, ranges: bool) -> None:
    server.cut_after, server.ranges = 5000, ranges
    folder = fetch_slice(rest, ask_offer(rest, PARTITION, "g"), tmp_path)
    assert_complete(folder, server)
    assert (WEIGHTS, "bytes=5000-") in server.requests


def test_the_next_process_goes_on_with_a_partial_file(
    server: SliceServer, rest: RestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer = ask_offer(rest, PARTITION, "g")
    monkeypatch.setattr(weights, "ATTEMPTS", 0)
    server.cut_after = 5000
    with pytest.raises(ServerUnreachable):
        fetch_slice(rest, offer, tmp_path)
    (part,) = tmp_path.rglob("*.part")
    assert part.stat().st_size == 5000
    monkeypatch.undo()
    assert_complete(fetch_slice(rest, offer, tmp_path), server)
    assert (WEIGHTS, "bytes=5000-") in server.requests


def test_a_partial_file_that_is_too_long_is_thrown_away(server: SliceServer, rest: RestClient, tmp_path: Path) -> None:
    offer = ask_offer(rest, PARTITION, "g")
    partial = tmp_path / "partial" / offer.identity[:32]
    partial.mkdir(parents=True)
    (partial / f"{WEIGHTS}.part").write_bytes(b"x" * 10**6)
    assert_complete(fetch_slice(rest, offer, tmp_path), server)


def test_corruption_is_found_and_not_kept(server: SliceServer, rest: RestClient, tmp_path: Path) -> None:
    offer = ask_offer(rest, PARTITION, "g")
    server.corrupt = True
    with pytest.raises(CheckpointError, match="nothing was sent"):
        fetch_slice(rest, offer, tmp_path)
    assert not list(tmp_path.rglob("*.part"))
    server.corrupt = False
    assert_complete(fetch_slice(rest, offer, tmp_path), server)


def test_two_at_once_share_one_download(server: SliceServer, tmp_path: Path) -> None:
    folders: list[Path] = []

    def fetch() -> None:
        client = RestClient(server.url)
        folders.append(fetch_slice(client, ask_offer(client, PARTITION, "g"), tmp_path))
        client.close()

    threads = [threading.Thread(target=fetch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 4
    assert len(set(folders)) == 1
    assert_complete(folders[0], server)
    assert [name for name, _ in server.requests].count(WEIGHTS) == 1


def test_full_disk(server: SliceServer, rest: RestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(weights, "_fill", full)
    with pytest.raises(CacheError, match=r"No space left.*make room"):
        fetch_slice(rest, ask_offer(rest, PARTITION, "g"), tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="permissions work otherwise there")
def test_cache_that_is_a_file(server: SliceServer, rest: RestClient, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(CacheError, match="cannot cache the weights"):
        fetch_slice(rest, ask_offer(rest, PARTITION, "g"), tmp_path / "cache")


def test_web_page_instead_of_a_server(server: SliceServer, rest: RestClient, tmp_path: Path) -> None:
    offer = ask_offer(rest, PARTITION, "g")
    server.html = True
    with pytest.raises(NotAServer, match="web page"):
        ask_offer(rest, PARTITION, "g")
    with pytest.raises(NotAServer):
        fetch_slice(rest, offer, tmp_path)
    with pytest.raises(NotAServer):
        rest.model_card()


def test_answers_that_are_json_but_not_ours(server: SliceServer, rest: RestClient) -> None:
    rest._json = lambda *_: {"id": 1}  # type: ignore[method-assign]
    with pytest.raises(NotAServer, match="describes no model"):
        rest.model_card()
    with pytest.raises(NotAServer, match="manifest"):
        ask_offer(rest, PARTITION, "g")
    rest._json = lambda *_: server.slice().manifest().to_json()  # type: ignore[method-assign]
    with pytest.raises(NotAServer, match="partition 2,1 was asked for"):
        ask_offer(rest, Partition(2, 1), "g")


def test_a_loading_server_is_asked_again(server: SliceServer) -> None:
    server.loading = 1
    impatient = RestClient(server.url)
    with pytest.raises(ServerUnreachable, match="still loading"):
        ask_offer(impatient, PARTITION, "g")
    server.loading = 1
    patient = RestClient(server.url, retry_seconds=5)
    assert ask_offer(patient, PARTITION, "g").manifest.partition == PARTITION
    impatient.close()
    patient.close()


def test_pins(server: SliceServer, rest: RestClient, tmp_path: Path, tiny_checkpoint: Any) -> None:
    state = StateFolder(tmp_path / "state")
    offer = ask_offer(rest, PARTITION, "g")
    assert check_pin(state, server.url, offer, accept_new=False) is True
    assert check_pin(state, server.url, offer, accept_new=False) is False
    server.checkpoint = tiny_checkpoint(hidden=64, seed=5)
    changed = ask_offer(rest, PARTITION, "g")
    with pytest.raises(PinMismatch, match=r"nothing was sent.*--accept-new-weights"):
        check_pin(state, server.url, changed, accept_new=False)
    with pytest.raises(PinMismatch):
        check_pin(state, server.url, Offer(offer.manifest, "other geometry"), accept_new=False)
    assert check_pin(state, "http://elsewhere", changed, accept_new=False) is True
    check_pin(state, server.url, changed, accept_new=True)
    check_pin(state, server.url, changed, accept_new=False)
    with pytest.raises(PinMismatch):
        check_pin(state, server.url, offer, accept_new=False)


def test_state_files_are_private_and_whole(tmp_path: Path) -> None:
    state = StateFolder(tmp_path / "state")
    secret = state.secret()
    assert len(secret) == 32
    assert StateFolder(tmp_path / "state").secret() == secret
    with state.edit_pins() as pins:
        pins["a"] = 1
    with contextlib.suppress(RuntimeError), state.edit_pins() as pins:
        pins["a"] = 2
        raise RuntimeError
    with state.edit_pins() as pins:
        assert pins == {"a": 1}
    if sys.platform != "win32":
        for name in ("edge-secret", "pins.json"):
            assert stat.S_IMODE((tmp_path / "state" / name).stat().st_mode) == 0o600
    (tmp_path / "state" / "edge-secret").write_bytes(b"short")
    (tmp_path / "state" / "pins.json").write_text("[]")
    with pytest.raises(CacheError, match="should hold 32 bytes"):
        state.secret()
    with pytest.raises(CacheError, match="cannot be read as pins"), state.edit_pins():
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError):
        StateFolder(tmp_path / "file").secret()
