"""Parts of a safetensors file on the hub, by HTTP byte ranges (RFC 9110, section 14)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

from tqdm import tqdm

from split_llama.errors import CheckpointError
from split_llama.safetensors_file import LENGTH_BYTES, TensorInfo, build_header, header_length, parse_header

_PROBE_BYTES = 1 << 19  # holds the header of nearly every shard
_PIECE_BYTES = 1 << 24


@dataclass(frozen=True, slots=True)
class RemoteShard:
    """One safetensors file of a hub repository at a commit; `assets` keeps its header for the next time."""

    repo: str
    name: str
    commit: str
    assets: Path

    def header(self) -> dict[str, TensorInfo] | None:
        """Fetch the header alone; None where the server does not answer to byte ranges."""
        kept = self.assets / f"{self.name}.header"
        if kept.is_file():
            return parse_header(kept.read_bytes(), Path(self.name))
        start = self._probe()
        if start is None:
            return None
        length = header_length(start[:LENGTH_BYTES], Path(self.name))
        text = start[LENGTH_BYTES : LENGTH_BYTES + length]
        if len(text) < length:
            text += b"".join(self._pieces(len(start), LENGTH_BYTES + length))
        tensors = parse_header(text, Path(self.name))
        writing = kept.with_suffix(".incomplete")
        writing.write_bytes(text)
        writing.rename(kept)
        return tensors

    def fetch(self, names: tuple[str, ...], target: Path) -> None:
        """Write the tensors `names` to `target` as a safetensors file of their own; go on after what is there."""
        tensors = self.header()
        assert tensors is not None
        chosen = dict(sorted(((name, tensors[name]) for name in names), key=lambda item: item[1].offset))
        header = build_header(chosen)
        size = len(header) + sum(info.nbytes for info in chosen.values())
        with target.open("r+b" if target.exists() else "w+b") as stream:
            done = _resume_at(stream, header, size)
            with _progress(f"{self.repo}: parts of {self.name}", size, done) as bar:
                for start, stop in _runs(chosen, done - len(header)):
                    for piece in self._pieces(start, stop):
                        stream.write(piece)
                        bar.update(len(piece))
        if target.stat().st_size != size:
            raise CheckpointError(f"{target} has {target.stat().st_size} bytes where {size} were expected; try again")

    def _probe(self) -> bytes | None:
        from huggingface_hub.utils import hf_raise_for_status, http_stream_backoff

        # Streamed, so that a server which ignores ranges does not send the whole file into memory.
        with http_stream_backoff(
            "GET", self._url(), headers=_headers(0, _PROBE_BYTES), timeout=_timeout(), retry_on_exceptions=()
        ) as response:
            if response.status_code == 200:
                return None
            hf_raise_for_status(response)
            return _checked(response.read(), response.headers.get("Content-Range"), 0, _PROBE_BYTES)

    def _pieces(self, start: int, stop: int) -> Iterator[bytes]:
        from huggingface_hub.utils import hf_raise_for_status, http_backoff

        for at in range(start, stop, _PIECE_BYTES):
            end = min(stop, at + _PIECE_BYTES)
            response = http_backoff("GET", self._url(), headers=_headers(at, end), timeout=_timeout())
            hf_raise_for_status(response)
            piece = _checked(response.content, response.headers.get("Content-Range"), at, end)
            if len(piece) != end - at:
                raise CheckpointError(f"{self.repo}: {self.name} on the hub is shorter than its header promises")
            yield piece

    def _url(self) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.repo, self.name, revision=self.commit)


def _headers(start: int, stop: int) -> dict[str, str]:
    from huggingface_hub.utils import build_hf_headers

    headers: dict[str, str] = build_hf_headers()  # with the token, if there is one
    return headers | {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}


def _timeout() -> float:
    from huggingface_hub import constants

    return constants.HF_HUB_DOWNLOAD_TIMEOUT


def _checked(content: bytes, content_range: str | None, start: int, stop: int) -> bytes:
    """Give `content` if it is what was asked for; a shorter piece is right only at the end of the file."""
    found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", content_range or "")
    if found is not None:
        first, last, total = map(int, found.groups())
        if first == start and last + 1 == min(stop, total) and len(content) == last + 1 - first:
            return content
    raise CheckpointError(
        f"the hub answered the byte range {start} to {stop} with {len(content)} bytes and Content-Range "
        f"{content_range!r:.80}; try again, and check proxies that rewrite answers"
    )


def _resume_at(stream: BinaryIO, header: bytes, size: int) -> int:
    """Position `stream` after what an earlier attempt wrote, or after a fresh header; return the position."""
    if stream.read(len(header)) != header:
        stream.seek(0)
        stream.truncate()
        stream.write(header)
        return len(header)
    stream.truncate(min(size, stream.seek(0, 2)))
    return stream.seek(0, 2)


def _runs(tensors: Mapping[str, TensorInfo], done: int) -> Iterator[tuple[int, int]]:
    """Merge neighbouring tensors (sorted by offset) into byte ranges, without the first `done` bytes."""
    run: tuple[int, int] | None = None
    for info in tensors.values():
        skipped = min(done, info.nbytes)
        done -= skipped
        start, stop = info.offset + skipped, info.offset + info.nbytes
        if start == stop:
            continue
        if run is not None and run[1] == start:
            run = (run[0], stop)
            continue
        if run is not None:
            yield run
        run = (start, stop)
    if run is not None:
        yield run


def _progress(what: str, total: int, done: int) -> tqdm[NoReturn]:
    """A progress bar on stderr, on a terminal; HF_HUB_DISABLE_PROGRESS_BARS switches it off or on."""
    from huggingface_hub import constants

    disable = constants.HF_HUB_DISABLE_PROGRESS_BARS
    return tqdm(desc=what, total=total, initial=done, unit="B", unit_scale=True, disable=disable)
