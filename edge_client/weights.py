"""The edge's slice of the model, fetched from the server it does not trust: pinned, resumable, checked, cached.

The digest is pinned on first use per server; a changed one is refused before anything is sent. A slice's folder in the
cache is named by what it holds, and appears only when every byte of it was checked.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from edge_client.rest import RestClient
from edge_client.state_files import StateFolder, cache_errors, write_atomically
from split_llama.config import Partition
from split_llama.edge_slice import SliceFile, SliceManifest
from split_llama.errors import CheckpointError, NotAServer, PinMismatch, ServerUnreachable

HASH_PIECE = 1 << 20
ATTEMPTS = 5

Progress = Callable[[int, int], None]
"""Called with (bytes present, bytes in all) while a slice is fetched."""


@dataclass(frozen=True, slots=True)
class Offer:
    """What a server offers to an edge: its manifest, and the identity of all its content."""

    manifest: SliceManifest
    geometry: str

    @property
    def identity(self) -> str:
        """SHA-256 (hex) over geometry, digests and every file: two offers with one identity are the same bytes."""
        text = json.dumps([self.geometry, self.manifest.to_json()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def ask_offer(rest: RestClient, partition: Partition, geometry: str) -> Offer:
    """Ask for the manifest of `partition`. Raises `NotAServer` when the answer is none."""
    try:
        manifest = SliceManifest.from_json(rest.slice_manifest(partition))
    except CheckpointError as error:
        raise NotAServer(f"{rest.address.base}: {error.message}") from error
    if manifest.partition != partition:
        raise NotAServer(f"partition {partition} was asked for, the server offers {manifest.partition}")
    return Offer(manifest, geometry)


def check_pin(state: StateFolder, url: str, offer: Offer, *, accept_new: bool) -> bool:
    """Compare the offer with what was pinned for `url`, and pin it on first use; say whether it was the first use.

    Raises `PinMismatch` for a change, unless `accept_new`, which pins the new one.
    """
    key = str(offer.manifest.partition)
    with state.edit_pins() as pins:
        pin = pins.setdefault(url, {})
        common = {"geometry": offer.geometry, "tokenizer": offer.manifest.tokenizer_digest}
        known = {name: pin[name] for name in common if name in pin}
        known_slice = pin.get("slices", {}).get(key)
        same = all(common[name] == value for name, value in known.items()) and known_slice in (None, offer.identity)
        if not same and not accept_new:
            raise PinMismatch(
                f"{url} now offers other weights than at first use (pinned {str(known_slice or known)[:24]}, offered "
                f"{offer.identity[:12]}); nothing was sent. If you expected a new model there, run again with "
                "--accept-new-weights"
            )
        pin.update(common)
        slices = pin.setdefault("slices", {}) if same else {}
        slices[key] = offer.identity
        pin["slices"] = slices
    return known_slice is None


def fetch_slice(rest: RestClient, offer: Offer, cache: Path, progress: Progress | None = None) -> Path:
    """Give the folder of the slice, from the cache or the server. Blocking.

    Raises `CheckpointError` when the bytes are not those promised, `CacheError` for a full disk, and what `RestClient`
    raises. What was fetched before an error is kept for the next try.
    """
    folder = cache / "slices" / offer.identity[:32]
    if (folder / "complete").is_file():
        return folder
    with cache_errors("cache the weights in"):
        partial = cache / "partial" / offer.identity[:32]
        partial.mkdir(parents=True, exist_ok=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        # A second process waits here and then finds the folder complete.
        with FileLock(partial.with_suffix(".lock")):
            if not (folder / "complete").is_file():
                _fill(rest, offer.manifest, partial, progress)
                write_atomically(partial / "complete", offer.manifest.digest.encode())
                os.replace(partial, folder)
    return folder


def _fill(rest: RestClient, manifest: SliceManifest, folder: Path, progress: Progress | None) -> None:
    total = sum(file.size for file in manifest.files)
    done = 0
    for file in manifest.files:
        path = folder / file.name
        if not path.is_file():
            for present in _fetch_file(rest, manifest.partition, file, folder / f"{file.name}.part"):
                if progress is not None:
                    progress(done + present, total)
            os.replace(folder / f"{file.name}.part", path)
        done += file.size
        if progress is not None:
            progress(done, total)


def _fetch_file(rest: RestClient, partition: Partition, file: SliceFile, part: Path) -> Iterator[int]:
    """Fetch one file into `part`, going on where it ends; yield the bytes present. Checks size and digest."""
    digest, present = _hash_existing(part, file.size)
    failures = 0
    while present < file.size or not part.exists():
        before = present
        try:
            with (
                rest.slice_file(partition, file.name, present) as (begin, pieces),
                part.open("r+b" if part.exists() else "wb") as stream,
            ):
                if begin != present:
                    digest, present = hashlib.sha256(), 0
                stream.seek(present)
                stream.truncate()
                for piece in pieces:
                    stream.write(piece)
                    digest.update(piece)
                    present += len(piece)
                    yield min(present, file.size)
                    if present > file.size:
                        break
        except ServerUnreachable:
            # A broken download goes on where it broke, as long as each attempt brings something.
            failures = 0 if present > before else failures + 1
            if failures >= ATTEMPTS:
                raise
            continue
        if present <= before < file.size:
            failures += 1
            if failures >= ATTEMPTS:
                break
    if present != file.size or digest.hexdigest() != file.sha256:
        part.unlink(missing_ok=True)
        raise CheckpointError(
            f"{file.name} came with {present} bytes and SHA-256 {digest.hexdigest()[:12]}, the server's manifest says "
            f"{file.size} bytes and {file.sha256[:12]}; nothing was sent. Try again; if it stays, the server is broken"
        )


def _hash_existing(part: Path, limit: int) -> tuple[Any, int]:
    digest, present = hashlib.sha256(), 0
    if part.is_file() and part.stat().st_size <= limit:
        with part.open("rb") as stream:
            while piece := stream.read(HASH_PIECE):
                digest.update(piece)
                present += len(piece)
    else:
        part.unlink(missing_ok=True)
    return digest, present
