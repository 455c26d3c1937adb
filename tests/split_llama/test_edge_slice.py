"""The edge's slice: what it holds, that it can be read in any pieces, and that a hostile manifest is refused."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, TinyModel, write_model

from split_llama.checkpoint import Checkpoint
from split_llama.config import Partition
from split_llama.edge_slice import (
    EdgeSlice,
    SliceManifest,
    edge_tensor_filter,
    edge_tensor_names,
    tokenizer_digest,
    weights_digest,
)
from split_llama.errors import BadRequest, CheckpointError, UsageError

TinyCheckpoint = Callable[..., Path]


def download(source: EdgeSlice, folder: Path) -> Path:
    folder.mkdir()
    for file in source.manifest().files:
        (folder / file.name).write_bytes(b"".join(source.read(file.name, 0, file.size)))
    return folder


@pytest.fixture(scope="module")
def small_slice(tmp_path_factory: pytest.TempPathFactory) -> EdgeSlice:
    folder = write_model(
        tmp_path_factory.mktemp("slice") / "model", TinyModel(layers=4, hidden=16, intermediate=8, shards=3)
    )
    return EdgeSlice(Checkpoint.open(folder), Partition(1, 2))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tie", [False, True])
def test_slice_opens_as_a_checkpoint_with_equal_tensors(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, family: str, tie: bool
) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint(family=family, tie=tie, shards=2, dtype=torch.bfloat16))
    partition = Partition(1, 1)
    edge = EdgeSlice(checkpoint, partition)
    folder = download(edge, tmp_path / "edge")
    opened = Checkpoint.open(folder)
    assert opened.config == checkpoint.config
    assert opened.tensor_names == set(edge_tensor_names(checkpoint, partition))
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(tensor, checkpoint.tensor(name))
        assert torch.equal(tensor, opened.tensor(name))
    for file in edge.manifest().files:
        assert hashlib.sha256((folder / file.name).read_bytes()).hexdigest() == file.sha256
        assert (folder / file.name).stat().st_size == file.size == edge.sizes[file.name]
    assert weights_digest(opened, partition) == weights_digest(checkpoint, partition) == edge.manifest().digest
    assert tokenizer_digest(folder) == edge.manifest().tokenizer_digest


def test_slice_of_a_real_checkpoint(data_dir: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(data_dir / "stories260K")
    folder = download(EdgeSlice(checkpoint, Partition(1, 1)), tmp_path / "edge")
    full = (data_dir / "stories260K" / "model.safetensors").stat().st_size
    assert (folder / "model.safetensors").stat().st_size < full * 0.7
    assert weights_digest(Checkpoint.open(folder), Partition(1, 1)) == weights_digest(checkpoint, Partition(1, 1))


@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_any_ranges_join_to_the_whole(small_slice: EdgeSlice, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(small_slice.sizes)))
    size = small_slice.sizes[name]
    cuts = data.draw(st.lists(st.integers(0, size), max_size=6))
    bounds = [0, *sorted(cuts), size]
    joined = b"".join(b"".join(small_slice.read(name, start, stop)) for start, stop in itertools.pairwise(bounds))
    expected = next(file for file in small_slice.manifest().files if file.name == name)
    assert len(joined) == size
    assert hashlib.sha256(joined).hexdigest() == expected.sha256


@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_a_range_is_a_cut_of_the_whole(small_slice: EdgeSlice, data: st.DataObject) -> None:
    size = small_slice.sizes["model.safetensors"]
    whole = b"".join(small_slice.read("model.safetensors", 0, size))
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, min(size, start + 3000)))
    assert b"".join(small_slice.read("model.safetensors", start, stop)) == whole[start:stop]


def test_pieces_are_bounded(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint(layers=3, hidden=256, heads=8, vocab=1500, intermediate=16)
    edge = EdgeSlice(Checkpoint.open(folder), Partition(1, 1))
    pieces = [len(piece) for piece in edge.read("model.safetensors", 0, edge.sizes["model.safetensors"])]
    assert max(pieces) == 1 << 20
    assert sum(pieces) == edge.sizes["model.safetensors"]


def test_tensors_stay_aligned_with_mixed_dtypes(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    folder = tiny_checkpoint(layers=3, hidden=4, heads=2, kv_heads=1, intermediate=3, dtype=torch.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    save_file(tensors, folder / "model.safetensors")
    edge = Checkpoint.open(download(EdgeSlice(Checkpoint.open(folder), Partition(1, 1)), tmp_path / "edge"))
    assert edge.info("model.norm.weight").offset % 4 == 0
    assert torch.equal(edge.tensor("model.norm.weight"), tensors["model.norm.weight"])


@pytest.mark.parametrize("start", [-1, 5])
def test_ranges_outside_the_file_are_refused(small_slice: EdgeSlice, start: int) -> None:
    for stop in (start - 1, small_slice.sizes["config.json"] + 1):
        with pytest.raises(BadRequest, match="not within it"):
            small_slice.read("config.json", start, stop)


@pytest.mark.parametrize("name", ["../config.json", "model.safetensors.index.json", "", "config.json\0"])
def test_files_outside_the_slice_are_refused(small_slice: EdgeSlice, name: str) -> None:
    with pytest.raises(BadRequest, match="the slice has no file"):
        small_slice.read(name, 0, 0)


@pytest.mark.parametrize(("p", "q"), [(0, 0), (0, 2), (2, 0), (1, 2)])
def test_which_tensors_an_edge_needs(tiny_checkpoint: TinyCheckpoint, p: int, q: int) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint())
    names = edge_tensor_names(checkpoint, Partition(p, q))
    blocks = {int(name.split(".")[2]) for name in names if name.startswith("model.layers.")}
    assert blocks == {*range(p), *range(4 - q, 4)}
    assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} <= set(names)


def test_a_stored_tied_head_is_left_out(tiny_checkpoint: TinyCheckpoint) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint(overrides={"tie_word_embeddings": True}))
    assert "lm_head.weight" in checkpoint.tensor_names
    assert "lm_head.weight" not in edge_tensor_names(checkpoint, Partition(1, 1))
    assert not edge_tensor_filter(checkpoint.config, Partition(1, 1))("lm_head.weight")


def test_digest_depends_on_weights_names_and_partition_only(tiny_checkpoint: TinyCheckpoint) -> None:
    one, sharded, other = (Checkpoint.open(tiny_checkpoint(**fields)) for fields in ({}, {"shards": 4}, {"seed": 1}))
    partition = Partition(1, 1)
    assert weights_digest(one, partition) == weights_digest(sharded, partition)
    assert weights_digest(one, partition) != weights_digest(other, partition)
    assert weights_digest(one, partition) != weights_digest(one, Partition(1, 2))


def test_digest_is_the_documented_one(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint(layers=2)
    checkpoint = Checkpoint.open(folder)
    tensors = load_file(folder / "model.safetensors")
    lines = [
        f"{name} F32 {','.join(map(str, tensors[name].shape))} {hashlib.sha256(tensors[name].numpy()).hexdigest()}\n"
        for name in edge_tensor_names(checkpoint, Partition(1, 0))
    ]
    assert weights_digest(checkpoint, Partition(1, 0)) == hashlib.sha256("".join(lines).encode()).hexdigest()


def test_incomplete_checkpoints_have_no_slice(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint()
    tensors = load_file(folder / "model.safetensors")
    for missing in ("lm_head.weight", "model.layers.3.input_layernorm.weight"):
        save_file({name: tensor for name, tensor in tensors.items() if name != missing}, folder / "model.safetensors")
        with pytest.raises(CheckpointError, match=missing):
            EdgeSlice(Checkpoint.open(folder), Partition(1, 1))


def test_a_slice_needs_a_tokenizer_and_a_server_block(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint()
    with pytest.raises(UsageError, match="leaves no block"):
        EdgeSlice(Checkpoint.open(folder), Partition(2, 2))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer.json"):
        EdgeSlice(Checkpoint.open(folder), Partition(1, 1))
    with pytest.raises(CheckpointError, match=r"tokenizer.json cannot be read"):
        tokenizer_digest(folder)


def test_files_that_shrink_while_served_are_an_error(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint()
    edge = EdgeSlice(Checkpoint.open(folder), Partition(1, 1))
    for name in ("config.json", "model.safetensors"):
        pieces = edge.read(name, 0, edge.sizes[name])
        (folder / name).write_bytes(b"")
        with pytest.raises(CheckpointError, match="became shorter"):
            list(pieces)


# The manifest comes from a server one does not trust.


def test_manifest_survives_json(small_slice: EdgeSlice) -> None:
    manifest = small_slice.manifest()
    assert SliceManifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest


def change(path: list[Any], value: Any) -> Callable[[Any], None]:
    def apply(raw: Any) -> None:
        for key in path[:-1]:
            raw = raw[key]
        raw[path[-1]] = value

    return apply


@pytest.mark.parametrize(
    ("mutate", "message"),
    [
        (change(["files", 0, "name"], "../../.bashrc"), "no part of a slice"),
        (change(["files", 0, "name"], "/etc/passwd"), "no part of a slice"),
        (change(["files", 0, "name"], "pytorch_model.bin"), "no part of a slice"),
        (change(["files", 0, "name"], ["config.json"]), "no part of a slice"),
        (change(["files", 0, "size"], -1), "must have 0 to"),
        (change(["files", 0, "size"], 1 << 60), "must have 0 to"),
        (change(["files", 0, "size"], True), "must have 0 to"),
        (change(["files", 0, "size"], 1.5), "must have 0 to"),
        (change(["files", 0, "sha256"], "00"), "64 lower-case hex digits"),
        (change(["files", 0, "sha256"], "Z" * 64), "64 lower-case hex digits"),
        (change(["files", 0, "mode"], 0o777), "a file must have name, size, sha256"),
        (change(["files"], {}), "files must be a list"),
        (change(["files"], []), "must name each of"),
        (change(["digest"], None), "digest must be 64"),
        (change(["tokenizer_digest"], 7), "tokenizer_digest must be 64"),
        (change(["partition"], [1]), "two block counts"),
        (change(["partition"], [1, -1]), "two block counts"),
        (change(["partition"], "1,1"), "two block counts"),
        (change(["more"], 1), "the manifest must have"),
    ],
)
def test_hostile_manifests(small_slice: EdgeSlice, mutate: Callable[[Any], None], message: str) -> None:
    raw = small_slice.manifest().to_json()
    mutate(raw)
    with pytest.raises(CheckpointError, match=message):
        SliceManifest.from_json(raw)


def test_a_file_may_be_named_once_only(small_slice: EdgeSlice) -> None:
    raw = small_slice.manifest().to_json()
    raw["files"].append(raw["files"][0])
    with pytest.raises(CheckpointError, match="once"):
        SliceManifest.from_json(raw)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["partition", "files", "digest", "tokenizer_digest", "name", "size", "sha256"]), inner
            )
        ),
        max_leaves=12,
    )
)
@settings(deadline=None)
def test_any_json_is_refused_or_read(raw: Any) -> None:
    with contextlib.suppress(CheckpointError):
        SliceManifest.from_json(raw)
