"""Where the edge's weights come from, and the checks before anything is sent: the server's slice, or an own copy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edge_client.rest import ModelCard, RestClient
from edge_client.settings import EdgeSettings
from edge_client.state_files import StateFolder, cache_errors, write_atomically
from edge_client.weights import Offer, Progress, ask_offer, check_pin, fetch_slice
from split_llama.config import BlockRange, ModelConfig, Partition
from split_llama.errors import ModelMismatch

if TYPE_CHECKING:
    from edge_client.adapter import EdgeAdapter


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A checked folder with the edge's tensors, and what the server was found to serve."""

    folder: Path
    card: ModelCard
    offer: Offer
    partition: Partition
    server_blocks: BlockRange
    adapter: EdgeAdapter | None = None


def find_model(
    settings: EdgeSettings,
    rest: RestClient,
    state: StateFolder,
    *,
    card: ModelCard | None = None,
    progress: Progress | None = None,
    notify: Callable[[str], None] = lambda line: None,
) -> ModelSource:
    """Find the edge's weights and make sure that they fit the server's. Blocking; sends nothing but questions.

    `card` is the server's, if it was asked for already.

    Raises `ModelMismatch` (own copy), `PinMismatch` (the server's slice changed), `AdapterMismatch`, and what fetching
    raises.
    """
    settings.check()
    card = card or rest.model_card()
    partition = _partition(settings, rest, card, notify)
    blocks = card.check_partition(partition)
    offer = ask_offer(rest, partition, card.geometry)
    if settings.model is not None:
        folder = _own_copy(settings.model, partition, offer, settings.caches(), notify)
    else:
        first = check_pin(state, rest.address.base, offer, accept_new=settings.accept_new_weights)
        if first:
            notify(f"first use of {rest.address.base}: its weights for {partition} are pinned ({offer.identity[:12]})")
        folder = fetch_slice(rest, offer, settings.caches(), progress)
        _check_slice(folder, partition, offer)
    adapter = _find_adapter(settings, rest, state, card, partition, folder) if settings.adapter is not None else None
    return ModelSource(folder, card, offer, partition, blocks, adapter)


def _find_adapter(
    settings: EdgeSettings, rest: RestClient, state: StateFolder, card: ModelCard, partition: Partition, folder: Path
) -> EdgeAdapter | None:
    from edge_client.adapter import find_adapter  # it imports torch

    return find_adapter(settings, rest, state, card, partition, read_geometry(folder))


def _partition(settings: EdgeSettings, rest: RestClient, card: ModelCard, notify: Callable[[str], None]) -> Partition:
    if settings.partition != "auto":
        return Partition.parse(settings.partition)
    from edge_client.planning.auto import resolve_partition  # it measures, and so imports torch

    return resolve_partition(settings, rest, card, notify)


def _own_copy(model: str, partition: Partition, offer: Offer, cache: Path, notify: Callable[[str], None]) -> Path:
    from split_llama.edge_slice import edge_tensor_filter, tokenizer_digest
    from split_llama.hub import fetch_model, resolve_model

    folder = resolve_model(model)
    config = read_geometry(folder)
    _check_geometry(config, offer, f"your copy of the model ({model})")
    if tokenizer_digest(folder) != offer.manifest.tokenizer_digest:
        raise ModelMismatch(
            f"the tokenizer of your copy of the model ({model}) is not the server's; nothing was sent. "
            "Use the same checkpoint, or leave --model out to fetch the server's"
        )
    folder = fetch_model(model, edge_tensor_filter(config, partition))
    if _cached_weights_digest(folder, partition, cache, notify) != offer.manifest.digest:
        raise ModelMismatch(
            f"the weights of your copy of the model ({model}) are not the server's; nothing was sent. "
            "Use the same checkpoint, or leave --model out to fetch the server's"
        )
    return folder


def read_geometry(folder: Path) -> ModelConfig:
    """Read the geometry of a model folder without opening its weights."""
    from split_llama.checkpoint import read_config

    return read_config(folder)[1]


def _check_geometry(config: ModelConfig, offer: Offer, whose: str) -> None:
    if config.geometry_digest() != offer.geometry:
        raise ModelMismatch(
            f"the geometry (config.json) of {whose} is not that of the model the server runs; nothing was sent"
        )


def _check_slice(folder: Path, partition: Partition, offer: Offer) -> None:
    """Check once per slice that its content is what the digests say: the manifest alone proves nothing."""
    marker = folder / "checked"
    if marker.is_file():
        return
    from split_llama.checkpoint import Checkpoint
    from split_llama.edge_slice import tokenizer_digest, weights_digest

    _check_geometry(read_geometry(folder), offer, "the weights the server offers")
    if weights_digest(Checkpoint.open(folder), partition) != offer.manifest.digest:
        raise ModelMismatch("the weights fetched do not have the digest the server gave for them; nothing was sent")
    if tokenizer_digest(folder) != offer.manifest.tokenizer_digest:
        raise ModelMismatch("the tokenizer fetched does not have the digest the server gave for it; nothing was sent")
    with cache_errors("cache the weights in"):
        write_atomically(marker, b"")


def _cached_weights_digest(folder: Path, partition: Partition, cache: Path, notify: Callable[[str], None]) -> str:
    """Hash the edge's tensors once per state of the files: gigabytes take seconds."""
    from split_llama.checkpoint import Checkpoint
    from split_llama.edge_slice import weights_digest

    files = sorted(folder.glob("*.safetensors"))
    facts = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    key = hashlib.sha256(json.dumps([facts, str(partition)]).encode()).hexdigest()
    path = cache / "digests" / key[:32]
    if path.is_file() and len(known := path.read_text().strip()) == 64:
        return known
    size = sum(file.stat().st_size for file in files)
    if size > 1 << 30:
        notify(f"hashing your copy of the model once ({size / 2**30:.1f} GiB)")
    digest = weights_digest(Checkpoint.open(folder), partition)
    with cache_errors("remember a digest in"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, digest.encode())
    return digest
