"""From the parts of a fine-tuning job to one PEFT folder over the whole model.

A client holds the adapters of A and C, the server those of B (or of all three, where the job shares them). Each tensor
has to be there once; what is missing, superfluous, of another rank or not finite is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from split_llama.adapter_file import block_of
from split_llama.config import BlockRange, ModelConfig, Partition
from split_llama.errors import AdapterMismatch, CacheError, CheckpointError, UsageError
from split_llama.json_file import read_json
from split_llama.lora import CONFIG_FILE, Adapter, LoraConfig, parse_adapter, read_adapter, write_adapter
from split_llama.settings import nearest
from training.client.jobs import JobKey, JobsClient
from training.job_config import JobConfig
from training.run import JOB_FILE, SHARED_FILE
from training.settings import TrainSettings

# Folders that clients leave in a run's, and in each of them the adapter that it holds at the end.
CLIENT_PREFIX = "client-"
ADAPTER_FOLDER = "adapter"
SEGMENTS = ("A", "B", "C")


@dataclass(frozen=True)
class Part:
    """An adapter and where it came from, as errors name it."""

    source: str
    adapter: Adapter


@dataclass(frozen=True)
class Parts:
    """All that was found of a job, and what is known of it: its base model, segments and partition, where it is."""

    parts: tuple[Part, ...]
    base_model: str | None = None
    segments: tuple[str, ...] = SEGMENTS
    partition: str | None = None


def parts_of_files(client: Path | None, shared: Path) -> Parts:
    """Take a client's folder (or the PEFT folder in it) and what all share. Raises as `read_part`."""
    found = () if client is None else (_client_folder(client),)
    return Parts(
        (*map(read_part, found), read_part(shared)),
        next((model for model in map(_base_model, (*found, shared)) if model is not None), None),
    )


def parts_of_job(settings: TrainSettings, job: str, client: Path | None) -> Parts:
    """Fetch what all share from a server, and take a client's folder. Raises as `JobsClient.adapter`."""
    if settings.job_key is None:
        raise UsageError("the server gives a job's adapter to who has its key: give --job-key KEY")
    key = JobKey(job, settings.job_key)
    with JobsClient.of(settings) as jobs:
        config = jobs.config(key)
        shared = Part(f"job {job} of {settings.server}", jobs.adapter(key))
    found = () if client is None else (_client_folder(client),)
    parts = (*(read_part(folder) for folder in found), shared)
    base = settings.model or next((model for model in map(_base_model, found) if model is not None), None)
    return Parts(parts, base, config.lora.segments, config.partition)


def parts_of_run(folder: Path, name: str | None) -> Parts:
    """Take what `split-train run` left in `folder`. `name` says whose A and C where each client has its own.

    Raises `UsageError` for a folder that is no run's or not finished, and where a name is needed; as `read_part`.
    """
    file, shared = folder / JOB_FILE, folder / SHARED_FILE
    if not file.is_file():
        raise UsageError(f"{folder} has no {JOB_FILE}, so it is no folder of a split-train run; check the path")
    job = read_json(file)
    config = JobConfig.parse(job.get("config", {}), str(file))
    held = (shared,) if config.shares_all or "B" in config.lora.segments else ()
    if held and not shared.is_file():
        raise UsageError(f"{folder} has no {SHARED_FILE}: the run has not come to its end; let it finish")
    found = () if config.shares_all and name is None else _chosen_client(folder, name)
    base = job.get("model") or next((model for model in map(_base_model, found) if model is not None), None)
    parts = tuple(read_part(each) for each in (*found, *held))
    return Parts(parts, base, config.lora.segments, config.partition)


def _chosen_client(folder: Path, name: str | None) -> tuple[Path, ...]:
    known = sorted(path.name.removeprefix(CLIENT_PREFIX) for path in folder.glob(f"{CLIENT_PREFIX}*") if path.is_dir())
    if name is None and len(known) != 1:
        raise UsageError(
            f"the clients of {folder} each have A and C of their own: say whose to take, --client "
            f"{'|'.join(known) or 'NAME'}"
        )
    chosen = known[0] if name is None else name
    if chosen not in known:
        raise UsageError(f"{folder} has no client {chosen!r}{nearest(chosen, known)}")
    adapter = folder / f"{CLIENT_PREFIX}{chosen}" / ADAPTER_FOLDER
    # Without A and C among the segments a client holds nothing.
    return (adapter,) if adapter.is_dir() else ()


def _client_folder(folder: Path) -> Path:
    """Give the PEFT folder in a client's folder; one that is a PEFT folder itself will do too."""
    return folder / ADAPTER_FOLDER if (folder / ADAPTER_FOLDER).is_dir() else folder


def _base_model(folder: Path) -> str | None:
    """Give the name of the base model that a PEFT folder was written for."""
    file = folder / CONFIG_FILE
    name = read_json(file).get("base_model_name_or_path") if file.is_file() else None
    return name if isinstance(name, str) and name else None


def read_part(path: Path) -> Part:
    """Read a PEFT folder, or a file as `GET /v1/jobs/{id}/adapter` gives it.

    Raises `CheckpointError`, `AdapterMismatch`.
    """
    if path.is_dir():
        return Part(str(path), read_adapter(path))
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"the adapter {path} cannot be read: {error.strerror or error}") from error
    return Part(str(path), parse_adapter(data, str(path)))


def adapted_blocks(num_hidden_layers: int, partition: Partition, segments: Iterable[str]) -> tuple[int, ...]:
    """Give the blocks of the named segments (`A`, `B`, `C`), ascending. Raises `UsageError`."""
    spans: dict[str, BlockRange] = {
        "A": partition.segment_a(num_hidden_layers),
        "B": partition.segment_b(num_hidden_layers),
        "C": partition.segment_c(num_hidden_layers),
    }
    wanted = set(segments)
    if unknown := sorted(wanted - set(SEGMENTS)):
        raise UsageError(f"there is no segment {unknown[0]!r}; expected some of {', '.join(SEGMENTS)}")
    return tuple(block for name in SEGMENTS if name in wanted for block in range(spans[name].start, spans[name].stop))


def merge_parts(parts: Sequence[Part], config: ModelConfig, blocks: Iterable[int]) -> Adapter:
    """Make one adapter of all parts, float32: every tensor of `blocks` once, and no other.

    Two parts may hold the same tensor if they agree on every value, as parties do that share it. Raises
    `AdapterMismatch`, which names the tensor and the parts.
    """
    if not parts:
        raise UsageError("there is no adapter to export: give a run's folder, or --client and --shared")
    lora = _one_lora(parts)
    tensors: dict[str, Tensor] = {}
    owners: dict[str, str] = {}
    for part in parts:
        part.adapter.check(config)
        for name, tensor in part.adapter.tensors.items():
            _refuse_other_copy(name, tensor, tensors, owners, part.source)
            tensors[name], owners[name] = tensor.detach().float(), part.source
    _check_blocks(owners, tuple(blocks))
    ordered = sorted(tensors, key=lambda name: (block_of(name), name))
    return Adapter(lora, {name: tensors[name] for name in ordered})


def write_merged(folder: Path, adapter: Adapter, base_model: str, *, force: bool = False) -> None:
    """Write the PEFT folder. Raises `UsageError` for a folder with anything in it unless `force`, and `CacheError`."""
    try:
        occupied = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    except OSError as error:
        raise CacheError(f"the folder {folder} cannot be looked into: {error.strerror or error}") from error
    if occupied and not (force and folder.is_dir()):
        advice = "give another one, or --force to overwrite the adapter in it" if folder.is_dir() else "give a folder"
        raise UsageError(f"{folder} exists and is not an empty folder: {advice}")
    write_adapter(folder, adapter, base_model)


def _one_lora(parts: Sequence[Part]) -> LoraConfig:
    """Give the configuration that all parts have; dropout is no part of a finished adapter."""
    first = parts[0]
    for part in parts[1:]:
        for field, name in (("r", "rank r"), ("alpha", "alpha"), ("target_modules", "target_modules")):
            mine, other = getattr(part.adapter.lora, field), getattr(first.adapter.lora, field)
            if mine != other:
                raise AdapterMismatch(
                    f"{part.source} has {name} {mine}, and {first.source} has {other}; "
                    "they are not parts of one job, and no PEFT folder can hold both"
                )
        if part.adapter.lora.use_rslora != first.adapter.lora.use_rslora:
            raise AdapterMismatch(f"one of {part.source} and {first.source} is rank-stabilised, the other is not")
    return replace(first.adapter.lora, dropout=0.0)


def _refuse_other_copy(
    name: str, tensor: Tensor, tensors: dict[str, Tensor], owners: dict[str, str], source: str
) -> None:
    if name in tensors and not torch.equal(tensors[name], tensor.float()):
        raise AdapterMismatch(
            f"{owners[name]} and {source} both have {name}, with other values; give each segment's adapter once, "
            "from the same step of the same job"
        )


def _check_blocks(owners: dict[str, str], wanted: tuple[int, ...]) -> None:
    found = {block_of(name): source for name, source in owners.items()}
    if missing := [block for block in wanted if block not in found]:
        raise AdapterMismatch(
            f"no part has the adapter of block{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}; "
            "give the part that has (--client for A and C, --shared or --server for B), "
            "or say with --segments which segments were trained"
        )
    if surplus := [block for block in found if block not in wanted]:
        raise AdapterMismatch(
            f"{found[surplus[0]]} has an adapter for block {surplus[0]}, which belongs to no segment that was to be "
            "exported; check --segments and --partition"
        )
