"""A draft head as a file: one safetensors file whose metadata says what it is and for which model. No pickle."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from edge_client.speculation.draft_head import DraftHead, HeadShape
from edge_client.state_files import cache_errors, write_atomically
from split_llama.checkpoint import Checkpoint
from split_llama.errors import CheckpointError, ModelMismatch

FORMAT = "fl-llama draft head"
VERSION = 1
METADATA_KEY = "draft_head"
VOCABULARY = "vocabulary"
# Rows of the embedding and of the head that go into a digest: hashing all of them would take seconds on a large model.
SAMPLED_ROWS = 64
LARGEST_SIDE = 2**16


@dataclass(frozen=True, slots=True)
class TrainedHead:
    """A head, the ids of the tokens it can guess, the digest of the model's ends, and how it was trained."""

    head: DraftHead
    vocabulary: Tensor
    ends: str
    training: dict[str, Any]


def ends_digest(checkpoint: Checkpoint) -> str:
    """SHA-256 (hex) over shapes, stored types, the final norm and evenly spread rows of embedding and LM head.

    It names what a draft head depends on, and is the same for every partition of a model and for its slices.
    """
    tied = checkpoint.config.tie_word_embeddings
    digest = hashlib.sha256()
    for name in ("model.norm.weight", "model.embed_tokens.weight", *(() if tied else ("lm_head.weight",))):
        tensor = checkpoint.tensor(name)
        digest.update(f"{name} {checkpoint.info(name).dtype} {tuple(tensor.shape)}\n".encode())
        rows = tensor if tensor.ndim == 1 else tensor[:: max(1, len(tensor) // SAMPLED_ROWS)]
        digest.update(rows.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def head_path(states: Path, ends: str) -> Path:
    """Where the head for a model is kept in the state folder."""
    return states / "drafters" / f"{ends[:32]}.safetensors"


def save_head(path: Path, trained: TrainedHead) -> None:
    """Write a head; matrices as float16, which is exact enough and half the size."""
    head = trained.head
    tensors = {
        name: (tensor.half() if tensor.ndim == 2 else tensor.float()).contiguous()
        for name, tensor in head.state_dict().items()
    }
    tensors[VOCABULARY] = trained.vocabulary.to(torch.int32)
    shape = head.shape
    about = {
        "format": FORMAT,
        "version": VERSION,
        "width": shape.width,
        "hidden": shape.hidden,
        "memory": shape.memory,
        "ends": trained.ends,
        "training": trained.training,
    }
    with cache_errors("keep the draft head in"):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomically(path, save(tensors, {METADATA_KEY: json.dumps(about)}))


def load_head(path: Path, ends: str) -> TrainedHead:
    """Read a head for the model whose ends have this digest.

    Raises `CheckpointError` for a file that is no head of this version, `ModelMismatch` for another model's.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get(METADATA_KEY, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as a draft head: {error}; train one (train-drafter)") from error
    shape = _shape(path, about)
    if about["ends"] != ends:
        raise ModelMismatch(
            f"{path} is a draft head for another model ({str(about['ends'])[:12]}, this one is {ends[:12]}); "
            "train one for this model (edge-client train-drafter)"
        )
    vocabulary = tensors.pop(VOCABULARY, torch.empty(0)).long()
    with torch.random.fork_rng(devices=[]):
        head = DraftHead(shape)
    try:
        head.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not hold the tensors of a draft head: {error}") from error
    if vocabulary.ndim != 1 or not len(vocabulary) or not all(bool(t.isfinite().all()) for t in tensors.values()):
        raise CheckpointError(f"{path} is damaged: its vocabulary or its weights are no numbers; train another head")
    head.requires_grad_(False)
    return TrainedHead(head, vocabulary, ends, dict(about["training"]))


def _shape(path: Path, about: object) -> HeadShape:
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no draft head: its metadata do not say so; train one (train-drafter)")
    if about.get("version") != VERSION:
        raise CheckpointError(
            f"{path} is a draft head of format version {about.get('version')}, this program reads {VERSION}; "
            "train it again (edge-client train-drafter)"
        )
    sizes = [about.get(key) for key in ("width", "hidden", "memory")]
    if not all(type(size) is int and 0 < size <= LARGEST_SIDE for size in sizes):
        raise CheckpointError(f"{path} gives the sizes {sizes} for a draft head; 1 to {LARGEST_SIDE} are possible")
    if not isinstance(about.get("ends"), str) or not isinstance(about.get("training"), dict):
        raise CheckpointError(f"{path} does not say for which model it is; train one (edge-client train-drafter)")
    return HeadShape(*(int(size) for size in sizes if size is not None))
