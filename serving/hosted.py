"""The hosted model: blocks in memory, the engine over them, and what an edge may ask about them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from serving.memory import CPU_FRACTION, CUDA_FRACTION, PageBudget, free_bytes, plan_pages
from serving.scheduler import max_step_rows
from serving.session import Terms
from serving.settings import ServerSettings
from serving.slices import Slices
from split_llama.checkpoint import Checkpoint
from split_llama.config import BlockRange, ModelConfig, Partition
from split_llama.engine.engine import PAGE_SIZE, Engine
from split_llama.engine.kv_cache import kv_page_bytes
from split_llama.errors import UsageError
from split_llama.load import load_segment, parse_device, parse_dtype
from split_llama.wire.codec import Codec, row_bytes
from split_llama.wire.frame import HEADER_SIZE, frame_limit

WINDOW_STEPS = 64
WINDOW_BYTES = 2 * 2**20
MESSAGE_BYTES = 2**20
BATCH_ROWS_CPU = 256
BATCH_ROWS_CUDA = 2048


@dataclass(frozen=True)
class Hosted:
    """A loaded model. `max_model_len` is in positions, `max_rows` the rows of one pass."""

    name: str
    checkpoint: Checkpoint
    allowed: Partition
    engine: Engine
    pages: PageBudget
    max_model_len: int
    max_rows: int
    max_num_seqs: int
    slices: Slices

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
        """The compute dtype: `float32`, `bfloat16` or `float16`."""
        return str(self.engine.segment.dtype).removeprefix("torch.")

    @cached_property
    def geometry(self) -> str:
        """SHA-256 (hex) of everything that changes the maths."""
        return self.config.geometry_digest()

    @property
    def max_frame_bytes(self) -> int:
        """Bytes of the largest frame."""
        return frame_limit(self.config.hidden_size)

    @property
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
    dtype = _dtype(settings, config, checkpoint, device)
    max_model_len = _max_model_len(settings, config)
    segment = load_segment(checkpoint, blocks, dtype=dtype, device=device)
    on_cuda = device.type == "cuda"
    pages = plan_pages(
        free=free_bytes(device),
        fraction=settings.gpu_memory_utilization or (CUDA_FRACTION if on_cuda else CPU_FRACTION),
        page_bytes=kv_page_bytes(config, len(blocks), PAGE_SIZE, dtype),
        page_size=PAGE_SIZE,
        max_model_len=max_model_len,
        max_sequences=settings.max_num_seqs,
    )
    return Hosted(
        name=settings.served_model_name or _model_name(settings.model, folder),
        checkpoint=checkpoint,
        allowed=allowed,
        engine=Engine(segment, num_pages=pages.num_pages, page_size=PAGE_SIZE),
        pages=pages,
        max_model_len=max_model_len,
        max_rows=settings.max_num_batched_tokens or (BATCH_ROWS_CUDA if on_cuda else BATCH_ROWS_CPU),
        max_num_seqs=settings.max_num_seqs,
        slices=Slices(checkpoint, allowed),
    )


def _dtype(settings: ServerSettings, config: ModelConfig, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    if settings.dtype != "auto":
        return parse_dtype(settings.dtype)
    # 16 bit is slower than fp32 for many rows on most CPUs; on CUDA the stored type is what the model was made for.
    stored = str(checkpoint.raw_config.get("dtype") or checkpoint.raw_config.get("torch_dtype") or "float32")
    return parse_dtype(stored) if device.type == "cuda" else torch.float32


def _max_model_len(settings: ServerSettings, config: ModelConfig) -> int:
    most = config.max_position_embeddings
    if settings.max_model_len is None:
        return most
    if settings.max_model_len > most:
        raise UsageError(f"--max-model-len {settings.max_model_len} exceeds the model's own {most} positions")
    return settings.max_model_len


def _model_name(model: str, folder: Path) -> str:
    return folder.name if Path(model).is_dir() else model
