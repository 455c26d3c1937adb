"""The adapters that a server holds by name: read and checked at start, asked for by OPEN, handed to edges."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from split_llama.config import BlockRange, ModelConfig, Partition
from split_llama.engine.low_rank import NO_ADAPTER, AdapterBank
from split_llama.errors import AdapterMismatch, BadRequest, FlLlamaError, UsageError
from split_llama.layers import Segment
from split_llama.lora import Adapter, adapter_bytes, read_adapter

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def parse_lora_modules(texts: Iterable[str]) -> dict[str, Path]:
    """Read `NAME=DIR` of each `--lora-modules`. Raises `UsageError`."""
    folders: dict[str, Path] = {}
    for text in texts:
        name, equals, folder = text.partition("=")
        if not (equals and folder and _NAME.fullmatch(name)):
            raise UsageError(
                f"--lora-modules takes NAME=DIR, the name of letters, digits, '.', '_' and '-'; got {text!r}"
            )
        if name in folders:
            raise UsageError(f"--lora-modules: the name {name!r} is given twice")
        folders[name] = Path(folder).expanduser()
    return folders


@dataclass(frozen=True)
class HostedAdapters:
    """Adapters by name, whole as they were read; their order is that of their numbers in the engine."""

    config: ModelConfig
    by_name: Mapping[str, Adapter]

    @classmethod
    def read(cls, folders: Mapping[str, Path], config: ModelConfig, blocks: BlockRange) -> HostedAdapters:
        """Read the folders and check them. Raises `CheckpointError`, `AdapterMismatch`, naming the adapter."""
        adapters: dict[str, Adapter] = {}
        for name, folder in folders.items():
            try:
                adapters[name] = _read(folder, config, blocks)
            except FlLlamaError as error:
                raise type(error)(f"--lora-modules {name}={folder}: {error.message}") from error
        return cls(config, adapters)

    @property
    def names(self) -> tuple[str, ...]:
        """All names."""
        return tuple(self.by_name)

    def bank(self, segment: Segment) -> AdapterBank | None:
        """Put their parts for the segment's blocks beside its weights; `None` without any adapter."""
        return AdapterBank(segment, list(self.by_name.values())) if self.by_name else None

    def number(self, name: str | None) -> int:
        """Give an adapter's number in the engine, -1 for no adapter. Raises `BadRequest` for an unknown name."""
        if name is None:
            return NO_ADAPTER
        self.find(name)
        return self.names.index(name)

    def name(self, number: int) -> str | None:
        """Give the name of a number."""
        return None if number == NO_ADAPTER else self.names[number]

    def find(self, name: str) -> Adapter:
        """Look an adapter up. Raises `BadRequest` that names those there are."""
        if name not in self.by_name:
            known = f"it holds {', '.join(self.names)}" if self.by_name else "it holds none"
            raise BadRequest(f"this server has no adapter {name!r}; {known}")
        return self.by_name[name]

    def edge_part(self, name: str, partition: Partition, base: str) -> bytes:
        """Give what an edge of `partition` needs of an adapter, as a safetensors file. Raises `BadRequest`."""
        adapter, count = self.find(name), self.config.num_hidden_layers
        a, c = (adapter.part(blocks(count)).tensors for blocks in (partition.segment_a, partition.segment_c))
        return adapter_bytes(Adapter(adapter.lora, {**a, **c}), base)

    def describe(self) -> list[dict[str, Any]]:
        """List name, rank and blocks of each, as `/v1/model` gives them."""
        return [
            {
                "name": name,
                "r": adapter.lora.r,
                "alpha": adapter.lora.alpha,
                "target_modules": list(adapter.lora.target_modules),
                "blocks": list(adapter.blocks),
            }
            for name, adapter in self.by_name.items()
        ]


def _read(folder: Path, config: ModelConfig, blocks: BlockRange) -> Adapter:
    adapter = read_adapter(folder)
    adapter.check(config)
    if not adapter.part(blocks).tensors:
        raise AdapterMismatch(
            f"the adapter has weights for the blocks {', '.join(map(str, adapter.blocks)) or 'none'} only, and blocks "
            f"{blocks} run here"
        )
    return adapter
