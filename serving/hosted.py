"""The hosted model: blocks in memory, the engine over them, and what an edge may ask about them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from serving.adapters import HostedAdapters, parse_lora_modules
from serving.device.choose import choose_attention, make_passes
from serving.memory import PageBudget, PassSize, estimate_pass_bytes, peak_bytes, size_cache
from serving.passes import Passes
from serving.scheduler import max_step_rows
from serving.session import Terms
from serving.settings import ServerSettings
from serving.slices import Slices
from split_llama.checkpoint import Checkpoint
from split_llama.config import BlockRange, ModelConfig, Partition
from split_llama.engine.engine import PAGE_SIZE, Engine
from split_llama.engine.kv_cache import KV_DTYPES, Order, kv_page_bytes
from split_llama.engine.low_rank import NO_ADAPTER, AdapterBank
from split_llama.errors import UsageError
from split_llama.layers import Segment
from split_llama.load import load_packed_segment, parse_device, parse_dtype
from split_llama.products import Numerics
from split_llama.wire.codec import Codec, row_bytes
from split_llama.wire.frame import HEADER_SIZE, frame_limit

WINDOW_STEPS = 64
WINDOW_BYTES = 2 * 2**20
MESSAGE_BYTES = 2**20
BATCH_ROWS_CPU = 256
BATCH_ROWS_CUDA = 2048
MIB = 2**20

log = logging.getLogger("fl_llama.hosted")


@dataclass(frozen=True)
class Hosted:
    """A loaded model. `max_model_len` is in positions, `max_rows` the rows of one pass."""

    name: str
    checkpoint: Checkpoint
    allowed: Partition
    numerics: Numerics
    engine: Engine
    passes: Passes
    pages: PageBudget
    max_model_len: int
    max_rows: int
    max_num_seqs: int
    slices: Slices
    adapters: HostedAdapters

    @property
    def config(self) -> ModelConfig:
        """The model's geometry."""
        return self.checkpoint.config

    @property
    def blocks(self) -> BlockRange:
        """The blocks hosted here."""
        return self.engine.blocks

    @property
    def dtype_name(self) -> str:
        """The type of the weights before any quantisation: `float32`, `bfloat16` or `float16`."""
        return str(self.numerics.weights).removeprefix("torch.")

    @property
    def kv_dtype_name(self) -> str:
        """The type of the KV cache: as `dtype_name`, or `int8` or `float8_e4m3fn`."""
        return str(self.engine.cache.k.dtype).removeprefix("torch.")

    @cached_property
    def geometry(self) -> str:
        """SHA-256 (hex) of everything that changes the maths."""
        return self.config.geometry_digest()

    @cached_property
    def max_frame_bytes(self) -> int:
        """Bytes of the largest frame."""
        return frame_limit(self.config.hidden_size)

    @cached_property
    def max_message_bytes(self) -> int:
        """Bytes of the largest message."""
        return max(MESSAGE_BYTES, 4 * self.max_frame_bytes)

    @property
    def terms(self) -> Terms:
        """What every session is granted. One frame holds no more rows than the narrowest codec lets in."""
        narrowest = row_bytes(Codec.INT8, self.config.hidden_size)
        in_frame = max(1, (self.max_frame_bytes - HEADER_SIZE) // narrowest)
        return Terms(
            window_steps=WINDOW_STEPS,
            window_bytes=max(WINDOW_BYTES, 4 * self.max_frame_bytes),
            max_step_rows=min(in_frame, max_step_rows(self.max_rows)),
            max_length=self.max_model_len,
            width=self.config.hidden_size,
        )


def load_hosted(settings: ServerSettings, folder: Path) -> Hosted:
    """Load the blocks of `folder` that the settings ask for, and size the KV cache.

    Raises `ModelError`, `UsageError`.
    """
    checkpoint = Checkpoint.open(folder)
    config = checkpoint.config
    allowed = Partition.parse(settings.allowed_partitions)
    blocks = allowed.segment_b(config.num_hidden_layers)
    device = parse_device(settings.device)
    numerics = Numerics(_dtype(settings, checkpoint, device), settings.quantization, device)
    dtype = numerics.compute
    max_model_len = _max_model_len(settings, config)
    adapters = HostedAdapters.read(parse_lora_modules(settings.lora_modules), config, blocks)
    name = _served_name(settings, folder, adapters)
    attention = choose_attention(settings.attention, config, device, PAGE_SIZE)
    segment = load_packed_segment(checkpoint, blocks, numerics)
    bank = adapters.bank(segment)
    max_rows = _max_rows(settings, device)
    kv_dtype = dtype if settings.kv_cache_dtype == "auto" else KV_DTYPES[settings.kv_cache_dtype]
    largest = PassSize(max_rows, max_step_rows(max_rows), max_model_len)

    def workspace() -> int:
        if device.type == "cuda":
            return settings.extension_bytes + peak_bytes(device, largest_pass(segment, largest, kv_dtype, bank))
        return estimate_pass_bytes(config, largest, dtype, kv_dtype)

    pages = size_cache(
        device,
        workspace=workspace,
        fraction=settings.gpu_memory_utilization,
        swap_gib=settings.swap_space,
        page_bytes=kv_page_bytes(config, len(blocks), PAGE_SIZE, kv_dtype),
        page_size=PAGE_SIZE,
        max_model_len=max_model_len,
        max_sequences=settings.max_num_seqs,
    )
    engine = Engine(
        segment,
        num_pages=pages.num_pages,
        page_size=PAGE_SIZE,
        kv_dtype=kv_dtype,
        swap_pages=pages.swap_pages,
        kv_order=Order.HEADS if attention == "torch" else Order.PAGES,
        adapters=bank,
    )
    hosted = Hosted(
        name=name,
        checkpoint=checkpoint,
        allowed=allowed,
        numerics=numerics,
        engine=engine,
        passes=make_passes(engine, attention, max_rows=max_rows, max_sequences=settings.max_num_seqs),
        pages=pages,
        max_model_len=max_model_len,
        max_rows=max_rows,
        max_num_seqs=settings.max_num_seqs,
        slices=Slices(checkpoint, allowed),
        adapters=adapters,
    )
    _log_cache(hosted)
    return hosted


def largest_pass(
    segment: Segment, size: PassSize, kv_dtype: torch.dtype, adapters: AdapterBank | None = None
) -> Callable[[], object]:
    """Prepare a pass of the largest size over pages of its own, to be run once.

    It has a step at the end of the longest session, and others that fill it up; all with an adapter, if there is any.
    """
    rows = [min(size.step_rows, size.rows - start) for start in range(0, size.rows, size.step_rows)]
    before = max(0, size.positions - rows[0])
    num_pages = -(-(before + rows[0]) // PAGE_SIZE) + sum(-(-count // PAGE_SIZE) for count in rows[1:])
    engine = Engine(segment, num_pages=num_pages, page_size=PAGE_SIZE, kv_dtype=kv_dtype, adapters=adapters)
    adapter = NO_ADAPTER if adapters is None else 0
    sequences = [engine.sequence(engine.blocks, before + size.rows, adapter) for _ in rows]
    # Never computed: what lies in these pages does not matter.
    sequences[0].append(before)
    plan = engine.plan([sequence.append(count) for sequence, count in zip(sequences, rows, strict=True)])
    states = torch.zeros(size.rows, segment.config.hidden_size, dtype=segment.dtype, device=segment.device)
    return lambda: engine.run(plan, states)


def _log_cache(hosted: Hosted) -> None:
    pages = hosted.pages
    log.info(
        "kv cache dtype=%s pages=%d positions=%d mib=%.1f page_bytes=%d kept_aside_mib=%.1f swap_mib=%.1f",
        hosted.kv_dtype_name,
        pages.num_pages,
        pages.num_slots,
        pages.num_bytes / MIB,
        pages.page_bytes,
        pages.workspace / MIB,
        pages.swap_pages * pages.page_bytes / MIB,
    )


def _dtype(settings: ServerSettings, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    if settings.dtype != "auto":
        return parse_dtype(settings.dtype)
    # On a CPU float32 is exact and batches well; on CUDA the stored type is what the model was made for.
    stored = str(checkpoint.raw_config.get("dtype") or checkpoint.raw_config.get("torch_dtype") or "float32")
    return parse_dtype(stored) if device.type == "cuda" else torch.float32


def _max_model_len(settings: ServerSettings, config: ModelConfig) -> int:
    most = config.max_position_embeddings
    if settings.max_model_len is None:
        return most
    if settings.max_model_len > most:
        raise UsageError(f"--max-model-len {settings.max_model_len} exceeds the model's own {most} positions")
    return settings.max_model_len


def _max_rows(settings: ServerSettings, device: torch.device) -> int:
    return settings.max_num_batched_tokens or (BATCH_ROWS_CUDA if device.type == "cuda" else BATCH_ROWS_CPU)


def _served_name(settings: ServerSettings, folder: Path, adapters: HostedAdapters) -> str:
    name = settings.served_model_name or _model_name(settings.model, folder)
    if name in adapters.names:
        raise UsageError(f"--lora-modules: {name!r} is the name of the model itself; give the adapter another")
    return name


def _model_name(model: str, folder: Path) -> str:
    return folder.name if Path(model).is_dir() else model
