"""From MODEL to a folder: a path, `demo`, or a hub id of which only what is needed is fetched.

`huggingface_hub` does the talking, so HF_HOME, HF_TOKEN, HF_HUB_OFFLINE and HF_ENDPOINT mean what its manual says.
Files fetched whole lie in its cache; parts of large shards lie beside it among its assets, as small checkpoint folders.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from split_llama.checkpoint import (
    CONFIG_FILE,
    GENERATION_FILE,
    INDEX_FILE,
    TOKENIZER_FILES,
    WEIGHTS_FILE,
    check_folder,
    read_weight_map,
)
from split_llama.demo import demo_model_path
from split_llama.errors import CacheError, CheckpointError
from split_llama.hub_ranges import RemoteShard

DEMO = "demo"
_FILE_SUFFIXES = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".json")
_OPTIONAL_FILES = (GENERATION_FILE, *TOKENIZER_FILES, INDEX_FILE)
# Above this share of a shard, one plain download (cached for everybody) is better than its parts.
_WHOLE_SHARE = 0.8


def resolve_model(model: str, *, cache_dir: Path | None = None) -> Path:
    """Give the folder of MODEL with config and tokenizer; a hub id's weights are not fetched yet.

    Raises `CheckpointError` (no such folder or repository, no access, offline) and `CacheError`.
    """
    local = _local_folder(model)
    return local if local is not None else _open_repo(model, cache_dir).snapshot


def fetch_model(model: str, wanted: Callable[[str], bool], *, cache_dir: Path | None = None) -> Path:
    """Give a folder that `Checkpoint.open` reads and that holds at least the tensors whose names are `wanted`.

    Of a hub id only the needed shards are fetched, and of a shard that is needed in part only the needed byte ranges.
    An interrupted download goes on where it stopped. Raises as `resolve_model` does.
    """
    local = _local_folder(model)
    if local is not None:
        return local
    repo = _open_repo(model, cache_dir)
    with _explained(model, "its weights"):
        return _fetch_weights(repo, wanted)


def _local_folder(model: str) -> Path | None:
    """Give the folder that `model` names, or None for a hub id."""
    if model == DEMO:
        return demo_model_path()
    if not model.strip():
        raise CheckpointError("MODEL is empty: give a folder, a hub id such as ORG/NAME, or demo")
    folder = Path(os.path.expanduser(model))
    looks_like_path = (
        model.startswith((".", "~", "/", "\\")) or model.count("/") > 1 or model.endswith(("/", *_FILE_SUFFIXES))
    )
    if os.path.exists(folder) or looks_like_path or folder.is_absolute() or "\\" in model:
        check_folder(folder)
        return folder
    return None


@dataclass(frozen=True, slots=True)
class _Repo:
    """One revision of a hub repository whose small files are in the cache."""

    model: str
    snapshot: Path
    cache_dir: Path | None

    @property
    def commit(self) -> str:
        return self.snapshot.name

    def download(self, name: str) -> Path:
        return _download(self.model, name, self.commit, self.cache_dir)

    def shard(self, name: str) -> RemoteShard:
        return RemoteShard(self.model, name, self.commit, self.assets())

    def assets(self) -> Path:
        """The folder for what is no whole file of the repository."""
        from huggingface_hub import cached_assets_path

        root = None if self.cache_dir is None else self.cache_dir / "assets"
        return cached_assets_path("fl-llama", self.model, self.commit, assets_dir=root)

    def cached(self, name: str) -> Path | None:
        return self.snapshot / name if (self.snapshot / name).is_file() else None


def _open_repo(model: str, cache_dir: Path | None) -> _Repo:
    with _explained(model, CONFIG_FILE):
        _fail_fast(model, cache_dir)
        repo = _Repo(model, _download(model, CONFIG_FILE, None, cache_dir).parent, cache_dir)
    for name in _OPTIONAL_FILES:
        with _explained(model, name):
            _download_if_there(repo, name)
    return repo


def _fail_fast(model: str, cache_dir: Path | None) -> None:
    """Ask once where nothing is cached: the library itself would retry for half a minute without a network."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    if not constants.HF_HUB_OFFLINE and try_to_load_from_cache(model, CONFIG_FILE, cache_dir=cache_dir) is None:
        get_hf_file_metadata(hf_hub_url(model, CONFIG_FILE))


def _download(model: str, name: str, revision: str | None, cache_dir: Path | None) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(model, name, revision=revision, cache_dir=cache_dir))


def _download_if_there(repo: _Repo, name: str) -> None:
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    known = try_to_load_from_cache(repo.model, name, cache_dir=repo.cache_dir, revision=repo.commit)
    if known is not None:
        return  # in the cache, or known there not to exist
    try:
        repo.download(name)
    except LocalEntryNotFoundError:
        # Offline it cannot be told apart from a file that the repository does not have; loading will notice.
        if not constants.HF_HUB_OFFLINE:
            raise
    except EntryNotFoundError:
        return


def _fetch_weights(repo: _Repo, wanted: Callable[[str], bool]) -> Path:
    weight_map = _weight_map(repo)
    if weight_map is None:
        parts = {WEIGHTS_FILE: _select(repo, WEIGHTS_FILE, wanted)}
    else:
        needed = {shard: [name for name in weight_map if weight_map[name] == shard] for shard in weight_map.values()}
        parts = {
            shard: None if all(map(wanted, names)) else _select(repo, shard, wanted)
            for shard, names in sorted(needed.items())
            if any(map(wanted, names))
        }
        if not parts:
            raise CheckpointError(f"{repo.model}: {INDEX_FILE} lists none of the tensors that are needed")
    for shard, selection in parts.items():
        if selection is None:
            repo.download(shard)
    if all(selection is None for selection in parts.values()) and len(parts) == len(
        set((weight_map or parts).values())
    ):
        return repo.snapshot
    return _assemble(repo, weight_map, parts)


def _weight_map(repo: _Repo) -> dict[str, str] | None:
    index = repo.cached(INDEX_FILE)
    return None if index is None else read_weight_map(index)


def _select(repo: _Repo, shard: str, wanted: Callable[[str], bool]) -> tuple[str, ...] | None:
    """Names to fetch from a shard that is needed in part, or None where the whole file is there or is better."""
    if repo.cached(shard) is not None:
        return None
    tensors = repo.shard(shard).header()
    if tensors is None:
        return None
    names = tuple(sorted(name for name in tensors if wanted(name)))
    share = sum(tensors[name].nbytes for name in names) / max(1, sum(info.nbytes for info in tensors.values()))
    return None if share > _WHOLE_SHARE else names


def _assemble(repo: _Repo, weight_map: dict[str, str] | None, parts: dict[str, tuple[str, ...] | None]) -> Path:
    """Build the folder with the selected parts and links to the shards that are whole; reuse it if it is there."""
    from huggingface_hub.utils import WeakFileLock

    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
    folder = repo.assets() / f"slice-{key}"
    with WeakFileLock(repo.assets() / f"slice-{key}.lock"):
        if folder.is_dir() and all((folder / shard).is_file() for shard in parts):
            return folder
        building = folder.with_suffix(".incomplete")
        building.mkdir(exist_ok=True)
        for name in (CONFIG_FILE, GENERATION_FILE, *TOKENIZER_FILES):
            if (repo.snapshot / name).is_file():
                shutil.copyfile(repo.snapshot / name, building / name)
        for shard, selection in parts.items():
            if selection is None:
                _link(repo.snapshot / shard, building / shard)
            else:
                repo.shard(shard).fetch(selection, building / shard)
        if weight_map is not None:
            kept = {
                name: shard
                for name, shard in weight_map.items()
                if shard in parts and (parts[shard] is None or name in (parts[shard] or ()))
            }
            (building / INDEX_FILE).write_text(json.dumps({"weight_map": kept}), encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        building.rename(folder)
    return folder


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        target.symlink_to(source.resolve())
    except OSError:  # a system or file system without symbolic links
        shutil.copyfile(source, target)


@contextmanager
def _explained(model: str, what: str) -> Iterator[None]:
    """Turn whatever the library raises into one of our errors, which says what to do."""
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

    try:
        yield
    except (CheckpointError, CacheError):
        raise
    except HFValidationError as error:
        raise CheckpointError(
            f"{model!r} is neither a folder nor a hub id such as ORG/NAME; check the path or the name"
        ) from error
    except Exception as error:
        # The library's HTTP client, and with it the exceptions of a broken link, differ from version to version.
        status = _status(error)
        if status is None and isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EACCES, errno.EROFS):
            raise CacheError(f"{what} of {model} cannot be stored: {error}; free space or set HF_HOME") from error
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise CheckpointError(
                f"{model} on the hub has no {what}: a checkpoint with config.json and safetensors files is needed "
                "(GGUF and pickled weights are not supported)"
            ) from error
        raise CheckpointError(_reason(model, what, status, error)) from error


def _status(error: BaseException | None) -> int | None:
    """The HTTP status behind an exception of the library, if there was an answer at all."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
        error = error.__cause__
    return None


def _reason(model: str, what: str, status: int | None, error: Exception) -> str:
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    endpoint = os.environ.get("HF_ENDPOINT", "the hub")
    if isinstance(error, GatedRepoError) or status == 403:
        return (
            f"{model} is gated or private (status {status}): accept its terms on its page at {endpoint}, and set "
            "HF_TOKEN to a token that may read it"
        )
    if status == 401:
        return (
            f"{model} does not exist at {endpoint}, or may not be read without a token (status 401): check the name, "
            "and set HF_TOKEN if it is private or gated"
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{model} is neither a folder here nor a repository at {endpoint}: check the name (private repositories "
            "need HF_TOKEN)"
        )
    if constants.HF_HUB_OFFLINE:
        return f"{what} of {model} is not in the cache and HF_HUB_OFFLINE is set: unset it, or fetch the model before"
    if status is not None:
        return f"{what} of {model} cannot be fetched: {endpoint} answered with status {status}; try again later"
    cause = error.__cause__ or error
    return (
        f"{what} of {model} cannot be fetched: {endpoint} cannot be reached ({type(cause).__name__}: {cause}); check "
        f"the network and HF_ENDPOINT. If {model} is meant as a folder: there is none of this name here"
    )
