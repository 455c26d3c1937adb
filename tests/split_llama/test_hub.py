"""Hub ids against a hub on loopback: only what is needed is fetched, and every failure says what to do."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from fake_hub import COMMIT, FakeHub
from huggingface_hub import constants
from safetensors.torch import load_file
from tiny_models import TinyModel, write_model

from split_llama.checkpoint import Checkpoint, holds_blocks
from split_llama.config import BlockRange, Partition
from split_llama.demo import demo_model_path
from split_llama.edge_slice import edge_tensor_filter, edge_tensor_names, weights_digest
from split_llama.errors import CacheError, CheckpointError
from split_llama.hub import fetch_model, resolve_model

MODEL = "org/tiny"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_model(tmp_path / "source", TinyModel(layers=6))


@pytest.fixture
def use_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """Point the library, which reads its environment on import, at another endpoint."""

    def use(url: str) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        huggingface_hub.close_session()

    yield use
    huggingface_hub.close_session()


@pytest.fixture
def hub(source: Path, use_hub: Callable[[str], None]) -> Iterator[FakeHub]:
    with FakeHub({MODEL: source}).running() as running:
        use_hub(running.url)
        yield running


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def edge_filter(source: Path, partition: Partition) -> Callable[[str], bool]:
    return edge_tensor_filter(Checkpoint.open(source).config, partition)


def check_tensors(folder: Path, source: Path) -> Checkpoint:
    checkpoint = Checkpoint.open(folder)
    full = Checkpoint.open(source)
    assert all(torch.equal(checkpoint.tensor(name), full.tensor(name)) for name in checkpoint.tensor_names)
    return checkpoint


# What MODEL may be


def test_a_folder_is_taken_as_it_is(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(str(source)) == source
    assert fetch_model(str(source), lambda name: True) == source
    monkeypatch.chdir(source.parent)
    assert resolve_model("source") == Path("source")
    monkeypatch.setenv("HOME", str(source.parent))
    assert resolve_model("~/source") == source


def test_demo_is_the_bundled_model() -> None:
    assert resolve_model("demo") == demo_model_path()


@pytest.mark.parametrize(
    "model", ["./missing", "missing/", "/missing/model", "a/b/c", "~/missing", "..", "C:\\models\\x"]
)
def test_missing_folders_are_no_hub_lookup(model: str, hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no such folder|no config.json"):
        resolve_model(model, cache_dir=tmp_path)
    assert hub.log == []


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("weights.gguf", "GGUF files are not supported"),
        ("model.safetensors", "is a file|no such folder"),
        ("", "MODEL is empty"),
        ("not a name", "neither a folder nor a hub id"),
        ("org/na\0me", "neither a folder nor a hub id"),
        ("org/" + "x" * 5000, "neither a folder nor a hub id"),
    ],
)
def test_other_names_are_refused(model: str, message: str, hub: FakeHub, cache: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        resolve_model(model, cache_dir=cache)
    assert hub.log == []


# Fetching


def test_resolving_fetches_no_weights(hub: FakeHub, cache: Path, source: Path) -> None:
    folder = resolve_model(MODEL, cache_dir=cache)
    assert folder.name == COMMIT
    names = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert {file.name for file in folder.iterdir()} == names
    assert all((folder / name).read_bytes() == (source / name).read_bytes() for name in names)
    assert not any("safetensors" in path for _, path, _ in hub.log if "index" not in path)


def test_whole_model(hub: FakeHub, cache: Path, source: Path) -> None:
    folder = fetch_model(MODEL, lambda name: True, cache_dir=cache)
    assert (folder / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert check_tensors(folder, source).tensor_names == Checkpoint.open(source).tensor_names


def test_an_edge_fetches_byte_ranges_of_one_big_file(
    hub: FakeHub, cache: Path, tmp_path: Path, use_hub: Callable[[str], None]
) -> None:
    # Larger than the first request for the header.
    source = write_model(tmp_path / "big", TinyModel(layers=8, hidden=128, intermediate=384))
    hub.repos["org/big"] = source
    partition = Partition(1, 1)
    folder = fetch_model("org/big", edge_filter(source, partition), cache_dir=cache)
    checkpoint = check_tensors(folder, source)
    assert checkpoint.tensor_names == set(edge_tensor_names(Checkpoint.open(source), partition))
    assert weights_digest(checkpoint, partition) == weights_digest(Checkpoint.open(source), partition)
    size = (source / "model.safetensors").stat().st_size
    wanted = (folder / "model.safetensors").stat().st_size
    assert hub.bytes_sent("model.safetensors") <= wanted + (1 << 19) < size
    assert (folder / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_a_server_fetches_only_the_shards_of_its_blocks(hub: FakeHub, cache: Path, tmp_path: Path) -> None:
    source = write_model(tmp_path / "sharded", TinyModel(layers=6, shards=4))
    hub.repos["org/sharded"] = source
    folder = fetch_model("org/sharded", holds_blocks(BlockRange(2, 4)), cache_dir=cache)
    checkpoint = check_tensors(folder, source)
    found = {name for name in checkpoint.tensor_names if holds_blocks(BlockRange(2, 4))(name)}
    assert len(found) == 2 * 9
    shards = sorted(file.name for file in source.glob("*.safetensors"))
    assert hub.bytes_sent(shards[0]) == hub.bytes_sent(shards[3]) == 0
    assert not (folder / shards[0]).exists()


def test_shards_needed_whole_and_in_part(hub: FakeHub, cache: Path, tmp_path: Path) -> None:
    source = write_model(tmp_path / "sharded", TinyModel(layers=6, shards=3))
    hub.repos["org/sharded"] = source
    first = set(load_file(source / "model-00001-of-00003.safetensors"))
    folder = fetch_model("org/sharded", lambda name: name in first or name == "model.norm.weight", cache_dir=cache)
    assert check_tensors(folder, source).tensor_names == first | {"model.norm.weight"}
    whole = cache / "models--org--sharded" / "snapshots" / COMMIT / "model-00001-of-00003.safetensors"
    assert whole.is_file()


def test_all_shards_whole_need_no_second_folder(hub: FakeHub, cache: Path, tmp_path: Path) -> None:
    source = write_model(tmp_path / "sharded", TinyModel(layers=2, shards=2))
    hub.repos["org/sharded"] = source
    folder = fetch_model("org/sharded", lambda name: True, cache_dir=cache)
    assert folder == cache / "models--org--sharded" / "snapshots" / COMMIT
    check_tensors(folder, source)


def test_a_second_fetch_asks_for_no_weights(hub: FakeHub, cache: Path, source: Path) -> None:
    wanted = edge_filter(source, Partition(1, 1))
    first = fetch_model(MODEL, wanted, cache_dir=cache)
    hub.log.clear()
    assert fetch_model(MODEL, wanted, cache_dir=cache) == first
    assert [entry[:2] for entry in hub.log] == [("HEAD", f"/{MODEL}/resolve/main/config.json")]


def test_a_weight_cache_that_was_cleaned_is_filled_again(hub: FakeHub, cache: Path, tmp_path: Path) -> None:
    source = write_model(tmp_path / "sharded", TinyModel(layers=6, shards=3))
    hub.repos["org/sharded"] = source
    first = set(load_file(source / "model-00001-of-00003.safetensors"))
    wanted = (first | {"model.norm.weight"}).__contains__
    folder = fetch_model("org/sharded", wanted, cache_dir=cache)
    for file in (cache / "models--org--sharded" / "blobs").iterdir():
        file.unlink()
    assert fetch_model("org/sharded", wanted, cache_dir=cache) == folder
    check_tensors(folder, source)


def test_an_interrupted_fetch_goes_on(
    hub: FakeHub, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_model(tmp_path / "big", TinyModel(layers=8, hidden=128, intermediate=384))
    hub.repos["org/big"] = source
    monkeypatch.setattr("split_llama.hub_ranges._PIECE_BYTES", 1 << 16)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    wanted = edge_filter(source, Partition(1, 1))
    hub.healthy_pieces = 4  # the header and three pieces
    with pytest.raises(CheckpointError, match=r"status 503; try again later"):
        fetch_model("org/big", wanted, cache_dir=cache)
    kept = next(cache.glob("**/*.incomplete/model.safetensors")).stat().st_size
    assert kept > 3 << 16
    hub.healthy_pieces = None
    hub.log.clear()
    folder = fetch_model("org/big", wanted, cache_dir=cache)
    assert hub.bytes_sent("model.safetensors") == (folder / "model.safetensors").stat().st_size - kept
    check_tensors(folder, source)


def test_a_hub_without_ranges_sends_whole_files(hub: FakeHub, cache: Path, source: Path) -> None:
    hub.ranges = False
    folder = fetch_model(MODEL, edge_filter(source, Partition(1, 1)), cache_dir=cache)
    assert (folder / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_a_foreign_header_on_the_hub_is_refused(hub: FakeHub, cache: Path, source: Path) -> None:
    (source / "model.safetensors").write_bytes(b"\xff" * 5000)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        fetch_model(MODEL, lambda name: True, cache_dir=cache)


def test_a_truncated_file_on_the_hub_is_refused(hub: FakeHub, cache: Path, tmp_path: Path) -> None:
    source = write_model(tmp_path / "big", TinyModel(layers=8, hidden=128, intermediate=384))
    hub.repos["org/big"] = source
    file = source / "model.safetensors"
    wanted = edge_filter(source, Partition(1, 1))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"shorter than its header promises|Content-Range"):
        fetch_model("org/big", wanted, cache_dir=cache)


def test_an_index_that_lists_nothing_needed(hub: FakeHub, cache: Path, tmp_path: Path) -> None:
    hub.repos["org/sharded"] = write_model(tmp_path / "sharded", TinyModel(layers=2, shards=2))
    with pytest.raises(CheckpointError, match="none of the tensors"):
        fetch_model("org/sharded", lambda name: False, cache_dir=cache)


# Failures


def test_unknown_repository(hub: FakeHub, cache: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither a folder here nor a repository .* check the name"):
        resolve_model("org/unknown", cache_dir=cache)


@pytest.mark.parametrize("denial", [(401, "GatedRepo"), (403, "GatedRepo"), (401, ""), (403, "")])
def test_gated_repositories_name_the_token(hub: FakeHub, cache: Path, denial: tuple[int, str]) -> None:
    hub.token, hub.denial = "hf_right", denial
    with pytest.raises(CheckpointError, match=f"status {denial[0]}.*HF_TOKEN"):
        resolve_model(MODEL, cache_dir=cache)


def test_the_token_opens_gated_repositories(
    hub: FakeHub, cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.token = "hf_right"
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    check_tensors(fetch_model(MODEL, edge_filter(source, Partition(1, 1)), cache_dir=cache), source)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_repositories_of_other_formats(hub: FakeHub, cache: Path, source: Path, missing: str) -> None:
    (source / missing).unlink()
    with pytest.raises(CheckpointError, match=r"safetensors files is needed"):
        fetch_model(MODEL, lambda name: True, cache_dir=cache)


def test_nothing_listens(use_hub: Callable[[str], None], cache: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        use_hub(f"http://127.0.0.1:{unused.getsockname()[1]}")
        with pytest.raises(CheckpointError, match=r"cannot be reached .* check the network and HF_ENDPOINT"):
            resolve_model(MODEL, cache_dir=cache)


def test_offline_without_cache(hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="not in the cache and HF_HUB_OFFLINE is set"):
        resolve_model(MODEL, cache_dir=cache)
    assert hub.log == []


@pytest.mark.parametrize("shards", [1, 3])
def test_offline_with_cache(
    hub: FakeHub, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int
) -> None:
    source = write_model(tmp_path / "other", TinyModel(layers=6, shards=shards))
    hub.repos["org/other"] = source
    wanted = edge_filter(source, Partition(1, 1))
    online = fetch_model("org/other", wanted, cache_dir=cache)
    hub.log.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch_model("org/other", wanted, cache_dir=cache) == online
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE"):
        fetch_model("org/other", holds_blocks(BlockRange(2, 3)), cache_dir=cache)
    assert hub.log == []


def test_a_cache_that_cannot_be_written(hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", full)
    with pytest.raises(CacheError, match="free space or set HF_HOME"):
        resolve_model(MODEL, cache_dir=cache)


def test_the_environment_is_honoured(hub: FakeHub, source: Path, tmp_path: Path) -> None:
    hub.token = "hf_right"
    code = "import sys; from split_llama.hub import fetch_model; print(fetch_model(sys.argv[1], lambda n: '.0.' in n))"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.url, "NO_PROXY": "127.0.0.1"}
    environment |= {"HF_TOKEN": "hf_right", "PYTHONPATH": str(Path(__file__).parents[2])}

    def run(**more: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code, MODEL], env=environment | more, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    folder = Path(run())
    assert folder.is_relative_to(tmp_path / "home")
    assert run(HF_HUB_OFFLINE="1") == str(folder)
    assert all(".layers.0." in name for name in check_tensors(folder, source).tensor_names)
