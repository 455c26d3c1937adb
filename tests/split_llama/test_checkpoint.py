"""Opening checkpoints: every layout that is read, and every one that is refused with a reason."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from json_values import JSON_VALUES
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, TinyModel, write_json, write_weights

from split_llama.checkpoint import Checkpoint, holds_blocks, is_plain_name, read_config, read_weight_map
from split_llama.config import BlockRange
from split_llama.errors import CheckpointError, UnsupportedModel
from split_llama.safetensors_file import build_header, data_end, parse_header, read_header

TinyCheckpoint = Callable[..., Path]


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def write_raw(file: Path, header: Any, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shards", [1, 3])
def test_reads_every_tensor_as_the_safetensors_library_does(
    tiny_checkpoint: TinyCheckpoint, family: str, shards: int
) -> None:
    folder = tiny_checkpoint(family=family, shards=shards)
    checkpoint = Checkpoint.open(folder)
    expected = stored_tensors(folder)
    assert checkpoint.tensor_names == set(expected)
    assert checkpoint.config.num_hidden_layers == 4
    for name, tensor in expected.items():
        assert torch.equal(checkpoint.tensor(name), tensor)
        assert b"".join(checkpoint.read_bytes(name, 0, tensor.nbytes, piece=100)) == tensor.numpy().tobytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_keeps_the_stored_dtype(tiny_checkpoint: TinyCheckpoint, dtype: torch.dtype) -> None:
    folder = tiny_checkpoint(dtype=dtype, layers=1)
    tensor = Checkpoint.open(folder).tensor("model.norm.weight")
    assert tensor.dtype == dtype
    assert torch.equal(tensor, stored_tensors(folder)["model.norm.weight"])


def test_reads_a_real_checkpoint(data_dir: Path) -> None:
    folder = data_dir / "stories260K"
    checkpoint = Checkpoint.open(folder)
    expected = stored_tensors(folder)
    assert checkpoint.tensor_names == set(expected)
    assert all(torch.equal(checkpoint.tensor(name), tensor) for name, tensor in expected.items())
    assert checkpoint.generation_config().eos_token_ids == (2,)


def test_info_gives_absolute_offsets(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint(layers=1)
    info = Checkpoint.open(folder).info("model.norm.weight")
    expected = stored_tensors(folder)["model.norm.weight"].numpy().tobytes()
    assert info.file.read_bytes()[info.offset : info.offset + info.nbytes] == expected
    assert (info.dtype, info.shape, info.nbytes) == ("F32", (32,), 128)


def test_writing_to_a_tensor_leaves_the_file_alone(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint(layers=1)
    before = (folder / "model.safetensors").read_bytes()
    checkpoint = Checkpoint.open(folder)
    checkpoint.tensor("model.norm.weight").zero_()
    assert (folder / "model.safetensors").read_bytes() == before
    assert checkpoint.tensor("model.norm.weight").abs().sum() > 0


@pytest.mark.parametrize("padding", range(8))
def test_reads_misaligned_and_empty_tensors(tiny_checkpoint: TinyCheckpoint, padding: int) -> None:
    folder = tiny_checkpoint(layers=1)
    header = {
        "a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]},
        "none": {"dtype": "F32", "shape": [0, 4], "data_offsets": [12, 12]},
        "scalar": {"dtype": "F32", "shape": [], "data_offsets": [12, 16]},
    }
    values = torch.tensor([1.0, -2.0, 3.5, 7.0])
    write_raw(folder / "model.safetensors", json.dumps(header).encode() + b" " * padding, values.numpy().tobytes())
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.tensor("a").tolist() == [1.0, -2.0, 3.5]
    assert checkpoint.tensor("a").data_ptr() % 4 == 0
    assert checkpoint.tensor("none").shape == (0, 4)
    assert checkpoint.tensor("scalar").item() == 7.0


def test_missing_tensor_is_named(tiny_checkpoint: TinyCheckpoint) -> None:
    with pytest.raises(CheckpointError, match=r"no tensor 'lm_head.weight'"):
        Checkpoint.open(tiny_checkpoint(layers=1, tie=True)).info("lm_head.weight")


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.float8_e4m3fn, "F8_E4M3"), (torch.int8, "I8"), (torch.int64, "I64")]
)
def test_other_dtypes_are_refused_by_name(tiny_checkpoint: TinyCheckpoint, dtype: torch.dtype, name: str) -> None:
    folder = tiny_checkpoint(layers=1)
    save_file({"odd": torch.zeros(4, dtype=dtype)}, folder / "model.safetensors")
    checkpoint = Checkpoint.open(folder)
    with pytest.raises(CheckpointError, match=f"stored as {name}; supported: F32, BF16, F16"):
        checkpoint.tensor("odd")


def test_holds_blocks() -> None:
    wanted = holds_blocks(BlockRange(1, 3))
    assert wanted("model.layers.1.mlp.up_proj.weight")
    assert wanted("model.layers.2.input_layernorm.weight")
    assert not wanted("model.layers.11.mlp.up_proj.weight")
    assert not wanted("model.layers.3.mlp.up_proj.weight")
    assert not wanted("model.layers.1.self_attn.rotary_emb.inv_freq")
    assert not wanted("lm_head.weight")


# Refusals: each names the file and what to do.


def damage_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def damage_config_not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{'single': quotes}")


def damage_config_list(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def damage_config_nested(folder: Path) -> None:
    (folder / "config.json").write_text("[" * 100_000)


def damage_config_twice(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama", "model_type": "qwen2"}')


def damage_config_binary(folder: Path) -> None:
    (folder / "config.json").write_bytes(b"\xff\xfe\x00")


def damage_config_types(folder: Path) -> None:
    write_json(folder / "config.json", TinyModel().config() | {"rope_theta": "ten thousand"})


def damage_config_huge(folder: Path) -> None:
    write_json(folder / "config.json", TinyModel().config() | {"num_hidden_layers": 10**15})


def damage_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def damage_gguf_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model.Q4_K_M.gguf")


def damage_pickled_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def damage_pth_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "consolidated.00.pth")


def damage_truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def damage_header_cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])


def damage_trailing(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as stream:
        stream.write(b"x")


def damage_empty(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def damage_garbage(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 4096)


def damage_zip(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"PK\x03\x04\x00\x00\x00\x00" + b"\0" * 100)


def damage_lfs_pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")


def damage_header_not_json(folder: Path) -> None:
    write_raw(folder / "model.safetensors", b"{not json")


def damage_overlap(folder: Path) -> None:
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    write_raw(folder / "model.safetensors", {"a": entry, "b": entry}, b"\0" * 4)


def damage_hole(folder: Path) -> None:
    header = {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}
    write_raw(folder / "model.safetensors", header, b"\0" * 8)


def damage_shape(folder: Path) -> None:
    header = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}
    write_raw(folder / "model.safetensors", header, b"\0" * 4)


def damage_negative(folder: Path) -> None:
    header = {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}
    write_raw(folder / "model.safetensors", header, b"\0" * 4)


REFUSED = {
    damage_no_config: "has no config.json",
    damage_config_not_json: "config.json is not valid JSON",
    damage_config_list: "config.json must be a JSON object, found list",
    damage_config_nested: "config.json is not valid JSON",
    damage_config_twice: "'model_type' is given twice",
    damage_config_binary: "config.json is not valid JSON",
    damage_config_types: "config.json",
    damage_config_huge: "at most 4096 blocks",
    damage_no_weights: "neither model.safetensors nor model.safetensors.index.json",
    damage_gguf_only: "model.Q4_K_M.gguf is a GGUF file, which is not supported",
    damage_pickled_only: "pytorch_model.bin holds pickled weights",
    damage_pth_only: "consolidated.00.pth holds pickled weights",
    damage_truncated: "model.safetensors is truncated",
    damage_header_cut: "model.safetensors is truncated",
    damage_trailing: "1 bytes after its last tensor",
    damage_empty: "not a safetensors file",
    damage_garbage: "not a safetensors file",
    damage_zip: "model.safetensors",
    damage_lfs_pointer: "not a safetensors file",
    damage_header_not_json: "not valid JSON",
    damage_overlap: "begins at byte",
    damage_hole: "begins at byte",
    damage_shape: "do not fit F32 of shape",
    damage_negative: "malformed",
}


@pytest.mark.parametrize(("damage", "message"), REFUSED.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_refuses(tiny_checkpoint: TinyCheckpoint, damage: Callable[[Path], None], message: str) -> None:
    folder = tiny_checkpoint(layers=1)
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(folder)
    assert str(folder) in caught.value.message


@pytest.mark.parametrize(
    ("path", "message"),
    [("nowhere", "no such folder"), ("file.gguf", "GGUF files are not supported"), ("file.safetensors", "is a file")],
)
def test_refuses_paths_that_are_no_folder(tmp_path: Path, path: str, message: str) -> None:
    (tmp_path / "file.gguf").touch()
    (tmp_path / "file.safetensors").touch()
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(tmp_path / path)


def test_pickled_weights_beside_safetensors_do_not_matter(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint(layers=1)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    Checkpoint.open(folder)


def test_other_model_types_are_refused(tiny_checkpoint: TinyCheckpoint) -> None:
    with pytest.raises(UnsupportedModel, match="gpt2"):
        Checkpoint.open(tiny_checkpoint(layers=1, overrides={"model_type": "gpt2"}))


def rewrite_index(folder: Path, **changes: str) -> None:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"] |= changes
    write_json(file, index)


def test_index_names_a_missing_shard(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint(shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks model-00002-of-00003.safetensors"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    "shard",
    ["../outside.safetensors", "/etc/passwd", "..\\x.safetensors", "a/b.safetensors", ".safetensors", "x.bin", 7],
)
def test_index_may_only_name_files_of_the_folder(tiny_checkpoint: TinyCheckpoint, shard: Any) -> None:
    folder = tiny_checkpoint(shards=2)
    rewrite_index(folder, **{"model.norm.weight": shard})
    with pytest.raises(CheckpointError, match="plain name"):
        Checkpoint.open(folder)


def test_index_and_shards_must_agree(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint(shards=2)
    rewrite_index(folder, **{"model.norm.weight": "model-00001-of-00002.safetensors"})
    with pytest.raises(CheckpointError, match="but it does not"):
        Checkpoint.open(folder)


def test_two_shards_may_not_hold_one_tensor(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint(shards=2)
    second = folder / "model-00002-of-00002.safetensors"
    save_file(load_file(second) | {"model.embed_tokens.weight": torch.zeros(4)}, second)
    with pytest.raises(CheckpointError, match=r"both .* hold the tensor 'model.embed_tokens.weight'"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": {}}', '{"weight_map": []}', "[]"])
def test_malformed_index(tmp_path: Path, index: str) -> None:
    (tmp_path / "index.json").write_text(index)
    with pytest.raises(CheckpointError, match=r"index.json"):
        read_weight_map(tmp_path / "index.json")


@given(st.text(max_size=12))
def test_plain_names_stay_in_their_folder(name: str) -> None:
    if is_plain_name(name):
        assert (Path("/folder") / name).parent == Path("/folder")
        assert name not in {".", ".."}


@given(st.binary(max_size=200))
@settings(deadline=None)
def test_no_header_does_anything_but_parse_or_be_refused(text: bytes) -> None:
    with contextlib.suppress(CheckpointError):
        parse_header(text, Path("x.safetensors"))


@given(st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "x"]), JSON_VALUES), JSON_VALUES)
@settings(deadline=None)
def test_hostile_header_entries(entry: dict[str, Any], other: Any) -> None:
    for value in (entry, {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | entry, other):
        with contextlib.suppress(CheckpointError):
            parse_header(json.dumps({"a": value}).encode(), Path("x.safetensors"))


def test_built_header_is_read_by_the_safetensors_library(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(6.0).view(2, 3), "a": torch.ones(3, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "x.safetensors")
    infos = read_header(tmp_path / "x.safetensors")
    data = {name: info.file.read_bytes()[info.offset : info.offset + info.nbytes] for name, info in infos.items()}
    again = tmp_path / "again.safetensors"
    again.write_bytes(build_header(infos) + b"".join(data.values()))
    with safe_open(again, "pt") as file:
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors.items())
    assert data_end(read_header(again), 0) == again.stat().st_size


def test_shards_without_index_are_not_guessed(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint(layers=1)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="or shards and their index"):
        Checkpoint.open(folder)


def test_rewriting_weights_shows_in_the_next_open(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint(layers=1)
    tensors = TinyModel(layers=1, seed=5).tensors()
    write_weights(folder, tensors)
    assert torch.equal(Checkpoint.open(folder).tensor("model.norm.weight"), tensors["model.norm.weight"])


@given(st.dictionaries(st.sampled_from(sorted(TinyModel(family="llama3").config())), JSON_VALUES))
@settings(deadline=None, max_examples=150)
def test_hostile_configs(tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any]) -> None:
    folder = tmp_path_factory.mktemp("hostile")
    write_json(folder / "config.json", TinyModel(family="llama3").config() | changes)
    with contextlib.suppress(CheckpointError, UnsupportedModel):
        read_config(folder)
