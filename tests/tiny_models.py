"""Random tiny LLaMA-family checkpoints in the Hugging Face layout, written in milliseconds and without transformers.

The weights are scaled up so that greedy text varies, and everything follows from the seed.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BOS, EOS, END_OF_TURN = "<s>", "</s>", "<|end|>"
SPECIAL_TOKENS = ["<unk>", BOS, EOS, END_OF_TURN]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
FAMILIES = ("llama", "llama3", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class TinyModel:
    """Geometry and storage of one tiny checkpoint. `overrides` go into config.json as they are."""

    family: str = "llama"
    layers: int = 4
    hidden: int = 32
    heads: int = 4
    kv_heads: int = 2
    head_dim: int | None = None
    intermediate: int = 48
    vocab: int = 320
    max_positions: int = 256
    sliding_window: int = 16
    tie: bool = False
    dtype: torch.dtype = torch.float32
    shards: int = 1
    seed: int = 0
    overrides: dict[str, Any] = field(default_factory=dict)

    @property
    def width_per_head(self) -> int:
        """Explicit head_dim, else 16 for qwen3 (whose head_dim is free of hidden / heads), else hidden / heads."""
        return self.head_dim or (16 if self.family == "qwen3" else self.hidden // self.heads)

    def config(self) -> dict[str, Any]:
        """The config.json of this geometry, with the fields that the family writes."""
        model_type = "llama" if self.family == "llama3" else self.family
        config: dict[str, Any] = {
            "architectures": [f"{model_type.capitalize()}ForCausalLM"],
            "model_type": model_type,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": self.max_positions,
            "vocab_size": self.vocab,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": self.tie,
            "torch_dtype": DTYPE_NAMES[self.dtype],
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        if self.head_dim is not None or self.family == "qwen3":
            config["head_dim"] = self.width_per_head
        return config | self._family_fields() | self.overrides

    def _family_fields(self) -> dict[str, Any]:
        scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        scaling["original_max_position_embeddings"] = 64
        fields: dict[str, dict[str, Any]] = {
            "llama": {"attention_bias": False, "mlp_bias": False, "rope_scaling": None},
            "llama3": {"rope_theta": 500000.0, "rope_scaling": scaling, "eos_token_id": [2, 3]},
            "mistral": {"sliding_window": self.sliding_window},
            "qwen2": {"use_sliding_window": False, "sliding_window": None, "rope_theta": 1000000.0},
            "qwen3": {"use_sliding_window": False, "attention_bias": False, "rope_theta": 1000000.0},
        }
        return fields[self.family]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor under its transformers name, in the stored dtype."""
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int, std: float, mean: float = 0.0) -> torch.Tensor:
            return (torch.randn(*shape, generator=generator) * std + mean).to(self.dtype)

        tensors = {"model.embed_tokens.weight": normal(self.vocab, self.hidden, std=3 / math.sqrt(self.hidden))}
        for block in range(self.layers):
            for name, shape in self._block_shapes().items():
                key = f"model.layers.{block}.{name}"
                if name.endswith("norm.weight"):
                    tensors[key] = normal(*shape, std=0.1, mean=1.0)
                elif name.endswith("bias"):
                    tensors[key] = normal(*shape, std=0.3)
                else:
                    tensors[key] = normal(*shape, std=1.4 / math.sqrt(shape[1]))
        tensors["model.norm.weight"] = normal(self.hidden, std=0.1, mean=1.0)
        if not self.tie:
            tensors["lm_head.weight"] = normal(self.vocab, self.hidden, std=3 / math.sqrt(self.hidden))
        return tensors

    def _block_shapes(self) -> dict[str, tuple[int, ...]]:
        wide, narrow = self.heads * self.width_per_head, self.kv_heads * self.width_per_head
        shapes: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (self.hidden,),
            "self_attn.q_proj.weight": (wide, self.hidden),
            "self_attn.k_proj.weight": (narrow, self.hidden),
            "self_attn.v_proj.weight": (narrow, self.hidden),
            "self_attn.o_proj.weight": (self.hidden, wide),
            "post_attention_layernorm.weight": (self.hidden,),
            "mlp.gate_proj.weight": (self.intermediate, self.hidden),
            "mlp.up_proj.weight": (self.intermediate, self.hidden),
            "mlp.down_proj.weight": (self.hidden, self.intermediate),
        }
        config = self._family_fields() | self.overrides
        if self.family == "qwen2" or config.get("attention_bias"):
            shapes |= {
                f"self_attn.{name}_proj.bias": (rows,) for name, rows in zip("qkv", (wide, narrow, narrow), strict=True)
            }
        if config.get("attention_bias"):
            shapes["self_attn.o_proj.bias"] = (self.hidden,)
        if config.get("mlp_bias"):
            shapes |= {f"mlp.{name}_proj.bias": (self.intermediate,) for name in ("gate", "up")}
            shapes["mlp.down_proj.bias"] = (self.hidden,)
        if self.family == "qwen3":
            shapes |= {f"self_attn.{name}_norm.weight": (self.width_per_head,) for name in "qk"}
        return shapes


def write_model(folder: Path, model: TinyModel) -> Path:
    """Write config, generation config, tokenizer and weights into `folder`; return it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config()
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": config["eos_token_id"]})
    write_tokenizer(folder, model.vocab, add_bos=not model.family.startswith("qwen"))
    write_weights(folder, model.tensors(), model.shards)
    return folder


def write_weights(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1) -> None:
    """Write one model.safetensors, or `shards` files of about the same number of tensors and their index."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_tokenizer(folder: Path, vocab: int, *, add_bos: bool = True) -> None:
    """Write a byte-level BPE tokenizer of exactly `vocab` tokens, and tokenizer_config.json with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_pseudo_text(), trainer)
    tokenizer.add_tokens([f"<unused{index}>" for index in range(tokenizer.get_vocab_size(), vocab)])
    if tokenizer.get_vocab_size() != vocab:
        raise ValueError(f"a byte-level tokenizer has at least {tokenizer.get_vocab_size()} tokens; got vocab={vocab}")
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 1)]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": BOS, "eos_token": EOS, "unk_token": "<unk>", "chat_template": CHAT_TEMPLATE}
    write_json(folder / "tokenizer_config.json", config | {"tokenizer_class": "PreTrainedTokenizerFast"})


def _pseudo_text() -> list[str]:
    """Sentences of made-up words: enough different pairs for a few hundred merges."""
    draw = random.Random(1)
    syllables = [a + b for a in "bdfgklmnprst" for b in ("a", "e", "i", "o", "u", "an", "er")]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 3))) for _ in range(300)]
    return [" ".join(draw.choices(words, k=12)) + "." for _ in range(60)]


def write_json(path: Path, value: object) -> None:
    """Write `value` as readable JSON."""
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")
