"""LoRA adapters (Hu et al. 2021) by PEFT's names: configuration, shapes, first values, and PEFT folders without PEFT.

An adapted matrix gives `W x + scaling * B (A x)`. A tensor's name is the matrix's own with `lora_A` or `lora_B` in it,
`model.layers.3.self_attn.q_proj.lora_A.weight`; in a file PEFT writes `base_model.model.` before it. What a PEFT
configuration asks for beyond that is refused by name: leaving it out would change the maths silently.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from split_llama.adapter_file import block_of, decode_tensors, encode_tensors, replace_file
from split_llama.config import BlockRange, ModelConfig
from split_llama.errors import AdapterMismatch, CacheError, CheckpointError, UsageError
from split_llama.json_file import brief, parse_json, read_json

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ATTENTION_TARGETS = TARGETS[:4]
MAX_RANK = 4096
# Where a server's file of an edge's part keeps its configuration.
_METADATA_KEY = "adapter_config"

# Adds the low-rank update: x [N, in], out [N, out] -> [N, out].
LowRank = Callable[[Tensor, Tensor], Tensor]

# Fields of PEFT's configuration that are read here, and those that say nothing about the maths of a finished adapter.
_READ = frozenset("peft_type r lora_alpha lora_dropout target_modules use_rslora".split())
_HARMLESS = frozenset(
    """auto_mapping base_model_name_or_path revision task_type inference_mode peft_version runtime_config
    megatron_core loftq_config qalora_group_size layers_to_transform layers_pattern""".split()
)
# These begin with other base weights (PiSSA and its like): what they learn fits no unchanged base.
_KEEPS_BASE = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """What an adapter is, apart from its weights. `target_modules` are kept in the block's order.

    Raises `UsageError` for values that no adapter can have.
    """

    r: int
    alpha: float
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ATTENTION_TARGETS
    use_rslora: bool = False

    def __post_init__(self) -> None:
        if type(self.r) is not int or not 1 <= self.r <= MAX_RANK:
            raise UsageError(f"a LoRA rank is a whole number from 1 to {MAX_RANK}; got {self.r!r}")
        for name, limit in (("alpha", math.inf), ("dropout", 1.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < limit:
                raise UsageError(f"LoRA's {name} is a number of at least 0 and below {limit:g}; got {value!r}")
        names = tuple(self.target_modules)
        unknown = [name for name in names if name not in TARGETS]
        if unknown or not names or len(set(names)) < len(names):
            raise UsageError(f"LoRA's target_modules are some of {', '.join(TARGETS)}, each once; got {list(names)}")
        object.__setattr__(self, "target_modules", tuple(name for name in TARGETS if name in names))

    @property
    def scaling(self) -> float:
        """What the product is multiplied by: alpha / r, or alpha / sqrt(r) where rank-stabilised."""
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def to_peft(self, base_model: str) -> dict[str, Any]:
        """Give the content of adapter_config.json; `base_model` is the name or folder of the base."""
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model,
            "inference_mode": True,
            "r": self.r,
            "lora_alpha": int(self.alpha) if float(self.alpha).is_integer() else self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": list(self.target_modules),
            "use_rslora": self.use_rslora,
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
        }

    @classmethod
    def from_peft(cls, raw: Mapping[str, Any]) -> LoraConfig:
        """Read a parsed adapter_config.json. Raises `AdapterMismatch` naming the field that cannot be served."""
        _refuse_other_maths(raw)
        targets = raw.get("target_modules")
        if not isinstance(targets, list | tuple) or not all(isinstance(name, str) for name in targets):
            raise AdapterMismatch(
                f"{CONFIG_FILE}: target_modules must be a list of names out of {', '.join(TARGETS)}; "
                f"got {brief(targets)}"
            )
        try:
            return cls(
                r=raw.get("r", 8),
                alpha=raw.get("lora_alpha", 8),
                dropout=raw.get("lora_dropout", 0.0),
                target_modules=tuple(targets),
                use_rslora=bool(raw.get("use_rslora", False)),
            )
        except UsageError as error:
            raise AdapterMismatch(f"{CONFIG_FILE}: {error.message}") from None


def _refuse_other_maths(raw: Mapping[str, Any]) -> None:
    if raw.get("peft_type") != "LORA":
        raise AdapterMismatch(f"{CONFIG_FILE}: peft_type {brief(raw.get('peft_type'))} is not supported; only LORA is")
    if raw.get("init_lora_weights") not in _KEEPS_BASE:
        raise AdapterMismatch(
            f"{CONFIG_FILE}: init_lora_weights {brief(raw['init_lora_weights'])} changes the base weights, which are "
            "shared here; convert the adapter to a plain LoRA (PEFT: path_initial_model_for_weight_conversion)"
        )
    if raw.get("bias", "none") != "none":
        raise AdapterMismatch(f"{CONFIG_FILE}: bias {brief(raw['bias'])} is not supported; 'none' is")
    for name, value in raw.items():
        if name in _READ or name in _HARMLESS or name in ("init_lora_weights", "bias") or not value:
            continue
        raise AdapterMismatch(
            f"{CONFIG_FILE}: {name} (value {brief(value)}) is not supported and would change what the adapter computes"
        )


def lora_shapes(config: ModelConfig, lora: LoraConfig, blocks: BlockRange) -> dict[str, tuple[int, int]]:
    """Give each tensor's shape in `blocks` by name: block by block, matrix by matrix, `lora_A` before `lora_B`."""
    shapes: dict[str, tuple[int, int]] = {}
    for block in range(blocks.start, blocks.stop):
        for matrix, (outputs, inputs) in matrix_shapes(config).items():
            if matrix.rpartition(".")[2] in lora.target_modules:
                name = f"model.layers.{block}.{matrix}"
                shapes[f"{name}.lora_A.weight"] = (lora.r, inputs)
                shapes[f"{name}.lora_B.weight"] = (outputs, lora.r)
    return shapes


def matrix_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Give `(out, in)` of each matrix of a block by its name below the block, in the block's order."""
    hidden, inner = config.hidden_size, config.intermediate_size
    wide, narrow = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return {
        "self_attn.q_proj": (wide, hidden),
        "self_attn.k_proj": (narrow, hidden),
        "self_attn.v_proj": (narrow, hidden),
        "self_attn.o_proj": (hidden, wide),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }


def init_lora(config: ModelConfig, lora: LoraConfig, blocks: BlockRange, seed: int) -> dict[str, Tensor]:
    """Give first values, float32, as PEFT draws them: `lora_A` Kaiming-uniform with a = sqrt(5), `lora_B` zeros.

    Each tensor follows from `(seed, name)` alone, so parties that hold different blocks agree on one adapter.
    """
    return {name: _first_value(name, shape, seed) for name, shape in lora_shapes(config, lora, blocks).items()}


def _first_value(name: str, shape: tuple[int, int], seed: int) -> Tensor:
    if name.endswith("lora_B.weight"):
        return torch.zeros(shape)
    drawn_from = hashlib.sha256(f"fl-llama lora {seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(drawn_from[:8], "little") >> 1)
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


@dataclass(frozen=True)
class Adapter:
    """One adapter, or the part of it for some blocks: tensors by name, in the type they were stored in, on the CPU."""

    lora: LoraConfig
    tensors: Mapping[str, Tensor]

    @property
    def blocks(self) -> tuple[int, ...]:
        """The blocks it has tensors for, ascending."""
        return tuple(sorted({block_of(name) for name in self.tensors}))

    def part(self, blocks: BlockRange) -> Adapter:
        """Give the tensors of `blocks` alone."""
        inside = range(blocks.start, blocks.stop)
        return Adapter(self.lora, {name: tensor for name, tensor in self.tensors.items() if block_of(name) in inside})

    def digest(self) -> str:
        """SHA-256 (hex) of all that decides what it computes: scaling, names, types, shapes and values."""
        running = hashlib.sha256(f"{self.lora.r} {self.lora.scaling!r}".encode())
        for name in sorted(self.tensors):
            tensor = self.tensors[name].detach().cpu().contiguous()
            running.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            running.update(tensor.flatten().view(torch.uint8).numpy().data)
        return running.hexdigest()

    def check(self, config: ModelConfig) -> None:
        """Raise `AdapterMismatch` unless it fits the model: whole in each of its blocks, right shapes, finite."""
        outside = [block for block in self.blocks if block >= config.num_hidden_layers]
        if outside:
            raise AdapterMismatch(
                f"the adapter has weights for block {outside[0]}; this model has {config.num_hidden_layers} blocks. "
                "It belongs to another model"
            )
        wanted: dict[str, tuple[int, int]] = {}
        for block in self.blocks:
            wanted |= lora_shapes(config, self.lora, BlockRange(block, block + 1))
        for name in wanted:
            if name not in self.tensors:
                raise AdapterMismatch(f"the adapter lacks {name}, which its target_modules ask for")
        for name, tensor in self.tensors.items():
            _check_tensor(name, tensor, wanted.get(name))


def _check_tensor(name: str, tensor: Tensor, wanted: tuple[int, int] | None) -> None:
    if wanted is None:
        raise AdapterMismatch(f"the adapter's tensor {name!r} has no place here: its matrix is not in target_modules")
    if tuple(tensor.shape) != wanted:
        raise AdapterMismatch(
            f"the adapter's {name} has shape {tuple(tensor.shape)}; {wanted} was expected of its rank and this model"
        )
    if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
        raise AdapterMismatch(f"the adapter's {name} holds values that are no finite numbers")


def read_adapter(folder: Path) -> Adapter:
    """Read a PEFT folder: adapter_config.json and adapter_model.safetensors; whether it fits a model says `check`.

    Raises `CheckpointError` (missing or damaged files; pickled weights are never opened) and `AdapterMismatch`.
    """
    folder = Path(folder)
    if not (folder / CONFIG_FILE).is_file():
        raise CheckpointError(f"{folder} has no {CONFIG_FILE}, so it is no PEFT adapter; check the path")
    lora = LoraConfig.from_peft(read_json(folder / CONFIG_FILE))
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        pickled = folder / "adapter_model.bin"
        why = f"; {pickled.name} is pickled, which is never loaded: save the adapter as safetensors" * pickled.exists()
        raise CheckpointError(f"{folder} has no {WEIGHTS_FILE}{why}")
    try:
        data = file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error
    return Adapter(lora, decode_tensors(data, str(file))[0])


def write_adapter(folder: Path, adapter: Adapter, base_model: str) -> None:
    """Write a PEFT folder. A crash leaves one without adapter_config.json, never a mixture of two adapters.

    Its blocks are listed as `layers_to_transform`, so that PEFT makes nothing for the others. Raises `CacheError`.
    """
    folder = Path(folder)
    config = adapter.lora.to_peft(base_model) | {"layers_to_transform": list(adapter.blocks)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_FILE).unlink(missing_ok=True)
        replace_file(folder / WEIGHTS_FILE, encode_tensors(adapter.tensors, {}))
        replace_file(folder / CONFIG_FILE, json.dumps(config, indent=2).encode())
    except OSError as error:
        raise CacheError(f"the adapter cannot be written to {folder}: {error.strerror or error}") from error


def adapter_bytes(adapter: Adapter, base_model: str) -> bytes:
    """Give an adapter as one safetensors file that has its configuration in its metadata."""
    return encode_tensors(adapter.tensors, {_METADATA_KEY: json.dumps(adapter.lora.to_peft(base_model))})


def parse_adapter(data: bytes, source: str) -> Adapter:
    """Read what `adapter_bytes` gave; `source` names it in errors. Raises `CheckpointError`, `AdapterMismatch`."""
    tensors, metadata = decode_tensors(data, source)
    config = metadata.get(_METADATA_KEY)
    if not isinstance(config, str):
        raise CheckpointError(f"{source} has no {_METADATA_KEY} in its metadata, so it is no adapter")
    return Adapter(LoraConfig.from_peft(parse_json(config.encode(), f"{source}, {_METADATA_KEY}")), tensors)
