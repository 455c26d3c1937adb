"""Model geometry and partition: what the maths of a checkpoint is, and who runs which blocks.

`ModelConfig.from_hf` reads a Hugging Face `config.json`. A field that changes the maths and is not supported here is
refused by name; nothing is ever ignored silently.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from split_llama.errors import UnsupportedModel, UsageError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# How weights may be stored in fewer bits than their type has (`split_llama.products`).
QUANTIZATIONS = ("none", "int8", "fp8", "int4")

# Fields this module reads, and fields that describe training or bookkeeping and leave inference as it is.
_READ = frozenset(
    """model_type hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    vocab_size rms_norm_eps rope_theta rope_scaling rope_parameters max_position_embeddings tie_word_embeddings
    attention_bias mlp_bias hidden_act sliding_window use_sliding_window max_window_layers layer_types""".split()
)
_HARMLESS = frozenset(
    """architectures attention_dropout auto_map bos_token_id chunk_size_feed_forward dtype eos_token_id id2label
    initializer_range is_decoder is_encoder_decoder keys_to_ignore_at_inference label2id output_attentions
    output_hidden_states pad_token_id problem_type return_dict task_specific_params torch_dtype
    transformers_version use_cache name_or_path hidden_dropout resid_pdrop embd_pdrop""".split()
)
# A field outside both lists passes only with the value that leaves the maths alone.
_NEUTRAL = {"pretraining_tp": 1, "partial_rotary_factor": 1.0}


@dataclass(frozen=True, order=True, slots=True)
class BlockRange:
    """Transformer blocks `[start, stop)` of the whole model."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise UsageError(f"a block range needs 0 <= start <= stop, got [{self.start}, {self.stop})")

    def __len__(self) -> int:
        return self.stop - self.start

    def __str__(self) -> str:
        return f"[{self.start}, {self.stop})"

    def contains(self, other: BlockRange) -> bool:
        """Say whether every block of `other` is in this range."""
        return self.start <= other.start and other.stop <= self.stop


@dataclass(frozen=True, slots=True)
class Partition:
    """The pair `(p, q)`: the edge runs the first `p` and the last `q` blocks."""

    p: int
    q: int

    def __post_init__(self) -> None:
        if self.p < 0 or self.q < 0:
            raise UsageError(f"a partition p,q needs both numbers >= 0, got {self.p},{self.q}")

    def __str__(self) -> str:
        return f"{self.p},{self.q}"

    @classmethod
    def parse(cls, text: str) -> Partition:
        """Read `"p,q"`."""
        try:
            p, q = (int(part) for part in text.split(","))
        except ValueError:
            raise UsageError(f"a partition is two whole numbers p,q such as 1,1; got {text!r}") from None
        return cls(p, q)

    def check(self, num_blocks: int) -> None:
        """Raise `UsageError` unless at least one of `num_blocks` blocks is left for the server."""
        if self.p + self.q >= num_blocks:
            raise UsageError(
                f"partition {self} leaves no block for the server: the model has {num_blocks} blocks, "
                f"so p + q must be below {num_blocks}"
            )

    def segment_a(self, num_blocks: int) -> BlockRange:
        """Blocks `[0, p)`, run at the edge."""
        self.check(num_blocks)
        return BlockRange(0, self.p)

    def segment_b(self, num_blocks: int) -> BlockRange:
        """Blocks `[p, L - q)`, run on the server."""
        self.check(num_blocks)
        return BlockRange(self.p, num_blocks - self.q)

    def segment_c(self, num_blocks: int) -> BlockRange:
        """Blocks `[L - q, L)`, run at the edge."""
        self.check(num_blocks)
        return BlockRange(num_blocks - self.q, num_blocks)


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding: base, and the scaling by position ("default", "linear" or Llama 3's "llama3")."""

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position_embeddings: int = 0

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> Rope:
        """Read `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (before)."""
        rope = dict(raw.get("rope_scaling") or {}) | dict(raw.get("rope_parameters") or {})
        kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
        rope.pop("type", None)
        theta = float(rope.pop("rope_theta", None) or raw.get("rope_theta") or 10000.0)
        if float(rope.pop("partial_rotary_factor", 1.0)) != 1.0:
            raise UnsupportedModel("config.json: partial_rotary_factor other than 1 is not supported")
        wanted = {
            "default": (),
            "linear": ("factor",),
            "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        }
        if kind not in wanted:
            raise UnsupportedModel(f"config.json: rope_type {kind!r} is not supported; supported: {', '.join(wanted)}")
        missing = [name for name in wanted[kind] if rope.get(name) is None]
        if missing:
            raise UnsupportedModel(f"config.json: rope_type {kind!r} needs {', '.join(missing)}")
        unknown = [name for name, value in rope.items() if name not in wanted[kind] and value is not None]
        if unknown and kind != "default":
            raise UnsupportedModel(f"config.json: rope field {unknown[0]!r} is not supported with rope_type {kind!r}")
        return cls(theta=theta, kind=kind, **{name: rope[name] for name in wanted[kind]})


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The geometry of a LLaMA-family model: everything that changes the maths, and nothing else.

    `sliding_windows` has one entry per block, in slots; 0 means the whole prefix is visible.
    """

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope: Rope
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_windows: tuple[int, ...]

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Read a parsed `config.json`; raise `UnsupportedModel` naming the field that cannot be served."""
        family = raw.get("model_type")
        if family not in FAMILIES:
            raise UnsupportedModel(
                f"config.json: model_type {family!r} is not supported; supported: {', '.join(FAMILIES)}"
            )
        _refuse_unknown_fields(raw)
        if raw.get("hidden_act", "silu") != "silu":
            raise UnsupportedModel(f"config.json: hidden_act {raw['hidden_act']!r} is not supported; supported: silu")
        hidden, heads = _positive(raw, "hidden_size"), _positive(raw, "num_attention_heads")
        layers = _positive(raw, "num_hidden_layers")
        attention_bias = _switch(raw, "attention_bias", family, ("llama", "qwen3"))
        config = cls(
            model_type=family,
            hidden_size=hidden,
            intermediate_size=_positive(raw, "intermediate_size"),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=_positive(raw, "num_key_value_heads", default=heads),
            head_dim=_positive(raw, "head_dim", default=hidden // heads),
            vocab_size=_positive(raw, "vocab_size"),
            rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            rope=Rope.from_hf(raw),
            max_position_embeddings=_positive(raw, "max_position_embeddings", default=2048),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            qkv_bias=attention_bias or family == "qwen2",
            output_bias=attention_bias,
            mlp_bias=_switch(raw, "mlp_bias", family, ("llama",)),
            qk_norm=family == "qwen3",
            sliding_windows=_sliding_windows(raw, family, layers),
        )
        config._check_heads()
        return config

    def _check_heads(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise UnsupportedModel(
                f"config.json: {self.num_attention_heads} attention heads cannot be grouped over "
                f"{self.num_key_value_heads} key-value heads"
            )
        if self.head_dim % 2:
            raise UnsupportedModel(f"config.json: rotary embedding needs an even head_dim, got {self.head_dim}")

    def geometry_digest(self) -> str:
        """SHA-256 (hex) of all fields: two parties with equal digests compute the same function of equal weights."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def _positive(raw: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = raw.get(name)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise UnsupportedModel(f"config.json: {name} must be a positive whole number, got {value!r}")
    return value


def _switch(raw: Mapping[str, Any], name: str, family: str, families: tuple[str, ...]) -> bool:
    value = bool(raw.get(name, False))
    if value and family not in families:
        raise UnsupportedModel(f"config.json: {name} is not supported for model_type {family!r}")
    return value


def _refuse_unknown_fields(raw: Mapping[str, Any]) -> None:
    for name, value in raw.items():
        bookkeeping = name in _READ or name in _HARMLESS or name.startswith("_") or name.endswith("_version")
        if bookkeeping or value is None or value is False or value == _NEUTRAL.get(name):
            continue
        raise UnsupportedModel(
            f"config.json: the field {name!r} (value {value!r}) is not supported and may change the maths. "
            "If it does not for this model, remove it from config.json"
        )


def _sliding_windows(raw: Mapping[str, Any], family: str, layers: int) -> tuple[int, ...]:
    """Give each block's window; the rules per family are those of transformers' configuration classes."""
    window = raw.get("sliding_window")
    if family.startswith("qwen") and not raw.get("use_sliding_window", False):
        window = None
    size = _positive({"sliding_window": window}, "sliding_window") if window else 0
    kinds = raw.get("layer_types")
    if kinds is None:
        if family == "llama" and size:
            raise UnsupportedModel("config.json: sliding_window is not supported for model_type 'llama'")
        first = raw.get("max_window_layers", 28) if family.startswith("qwen") else 0
        return tuple(size if block >= first else 0 for block in range(layers))
    if len(kinds) != layers or not set(kinds) <= {"full_attention", "sliding_attention"}:
        raise UnsupportedModel(
            f"config.json: layer_types must name full_attention or sliding_attention for each of the {layers} blocks"
        )
    if "sliding_attention" in kinds and not size:
        raise UnsupportedModel("config.json: layer_types asks for sliding_attention but sliding_window is not set")
    return tuple(size if kind == "sliding_attention" else 0 for kind in kinds)
