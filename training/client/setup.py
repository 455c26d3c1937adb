"""From settings and a job to a client that can begin: weights, noise, data, state. Blocking; sends only questions."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from edge_client.edge_model import CALIBRATION_TOKENS
from edge_client.model_source import ModelSource, find_model, read_geometry
from edge_client.rest import RestClient
from edge_client.settings import EdgeSettings
from edge_client.state_files import StateFolder, cache_errors, write_atomically
from edge_client.tokenizer import EdgeTokenizer
from edge_client.weights import Progress
from split_llama.checkpoint import Checkpoint
from split_llama.errors import UsageError
from split_llama.load import parse_device, parse_dtype, set_up_cpu
from split_llama.noise import NoiseScope, NoiseSpec, calibrate_clip
from split_llama.products import Numerics
from training.client.data import ClientData
from training.client.maths import ClientMaths
from training.client.privacy import GradientNoise, GradientSpec, StateNoise
from training.compute.batch import Batch
from training.compute.ends import Ends
from training.job_config import JobConfig
from training.settings import TrainSettings
from training.tasks.examples import AnyExample

Notify = Callable[[str], None]
MEMBER_FILE = "member.json"


@dataclass(frozen=True, slots=True)
class ClientFolder:
    """OUT/client-NAME, of one client of one job. `secret` proves to the server that a client is the one it was."""

    path: Path
    secret: str

    @staticmethod
    def is_of(out: Path, name: str) -> bool:
        """Say whether a client of this name has worked in its folder."""
        return (out / f"client-{name}" / MEMBER_FILE).is_file()

    @classmethod
    @contextlib.contextmanager
    def open(cls, out: Path, name: str, job: str) -> Iterator[ClientFolder]:
        """Take the folder for a block. Raises `UsageError` when it is another job's or in use, `CacheError`."""
        path = out / f"client-{name}"
        with cache_errors("make the client's folder"):
            # What a client learns is its own business.
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = FileLock(path / ".lock", mode=0o600)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UsageError(
                f"another process is at work as this client in {path}; end it, or use another --out"
            ) from None
        try:
            yield cls(path, _member_secret(path, job))
        finally:
            lock.release()


def _member_secret(path: Path, job: str) -> str:
    file = path / MEMBER_FILE
    if file.is_file():
        try:
            known = json.loads(file.read_bytes())
            found, secret = known["job"], known["secret"]
        except (ValueError, KeyError, TypeError):
            raise UsageError(f"{file} cannot be read; move the folder away to begin anew") from None
        if found != job:
            raise UsageError(f"{path} holds a client of job {found}, not of {job}; choose another --out or --name")
        return str(secret)
    secret = secrets.token_hex(32)
    with cache_errors("keep the client's secret in"):
        write_atomically(file, json.dumps({"job": job, "secret": secret}).encode())
    return secret


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """All that a client computes with."""

    edge: EdgeSettings
    source: ModelSource
    maths: ClientMaths
    data: ClientData
    spec: NoiseSpec

    @property
    def width(self) -> int:
        """Hidden size of the model."""
        return self.source.card.hidden_size


def prepare(
    settings: TrainSettings, config: JobConfig, job: str, examples: list[AnyExample], notify: Notify, progress: Progress
) -> Prepared:
    """Find and check the weights, load both ends, encode the data. Raises `FlLlamaError`."""
    edge = settings.edge(config.partition, config.codec)
    source = _source(edge, notify, progress)
    longest = read_geometry(source.folder).max_position_embeddings
    if config.max_length > longest:
        raise UsageError(f"the job's max_length is {config.max_length}, the model's context {longest}: make it shorter")
    data = ClientData.encode(examples, source.folder, config.max_length, config.batch_size, config.seed)
    numerics = _numerics(settings)
    checkpoint = Checkpoint.open(source.folder)
    ends = Ends.load(
        checkpoint,
        source.partition,
        config.lora.config,
        config.lora.segments,
        dtype=numerics.compute,
        device=numerics.device,
        recompute=config.gradient_checkpointing,
    )
    bos = checkpoint.generation_config().bos_token_id
    bos = EdgeTokenizer.open(source.folder).bos_token_id if bos is None else bos
    spec = _noise_spec(edge, source, ends, bos, numerics.label)
    secret = StateFolder(edge.states()).secret()
    noise = StateNoise(spec, _scope(source, numerics, spec), secret, bos)
    gradients = GradientNoise(GradientSpec(settings.gradient_noise, settings.gradient_clip), secret, job)
    return Prepared(edge, source, ClientMaths(ends, config, noise, gradients, source.card.hidden_size), data, spec)


def _source(edge: EdgeSettings, notify: Notify, progress: Progress) -> ModelSource:
    """Find the weights and see that they are the server's."""
    rest = RestClient.of(edge)
    try:
        return find_model(edge, rest, StateFolder(edge.states()), progress=progress, notify=notify)
    finally:
        rest.close()


def _scope(source: ModelSource, numerics: Numerics, spec: NoiseSpec) -> NoiseScope:
    """Give what noise belongs to, as the edge has it; the adapter's digest comes later."""
    return NoiseScope(
        model=source.offer.manifest.digest,
        adapter="",
        blocks=source.server_blocks,
        width=source.card.hidden_size,
        numerics=f"{numerics.label} {numerics.compute} {numerics.device.type}",
        spec=spec,
    )


def _numerics(settings: TrainSettings) -> Numerics:
    set_up_cpu(settings.threads)
    return Numerics(parse_dtype(settings.dtype), "none", parse_device(settings.device))


def _noise_spec(edge: EdgeSettings, source: ModelSource, ends: Ends, bos: int | None, label: str) -> NoiseSpec:
    """Give the setting with its clip norm, which is that of inference."""
    spec = NoiseSpec.parse(edge.noise)
    if spec.is_on and edge.clip != "auto":
        return dataclasses.replace(spec, clip=float(edge.clip))
    if not spec.sigma:
        return spec
    path = edge.caches() / "clip" / f"{source.offer.manifest.digest[:32]}-{label}"
    if path.is_file():
        with contextlib.suppress(ValueError):
            return dataclasses.replace(spec, clip=float(path.read_text()))
    clip = calibrate_clip(_output_norms(ends, bos))
    with cache_errors("remember the clip norm in"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, repr(clip).encode())
    return dataclasses.replace(spec, clip=clip)


def _output_norms(ends: Ends, bos: int | None) -> torch.Tensor:
    """Norms of A's output over the same public tokens as at inference, each after BOS if any."""
    vocabulary = ends.a.segment.config.vocab_size
    begin = [] if bos is None else [bos]
    tokens = [(2 * i + 1) * vocabulary // (2 * CALIBRATION_TOKENS) for i in range(CALIBRATION_TOKENS)]
    batch = Batch.of([[*begin, token] for token in tokens], [[-100] * (len(begin) + 1)] * len(tokens))
    states, _ = ends.forward_a(batch, {}, None)
    rows: torch.Tensor = states.float().cpu()[len(begin) :: len(begin) + 1].norm(dim=-1)
    return rows
