"""The demo model's geometry, initial weights and folder."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from training.demo.corpus import BOS, END, EOS, PAD
from training.demo.tokenizer import save_tokenizer

CONTEXT = 1024
_HEADS, _KV_HEADS, _HEAD_DIM = 4, 2, 32


def build_model(tokenizer: Tokenizer) -> LlamaForCausalLM:
    """A fresh fp32 model; its initial weights come from torch's global generator."""
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=128,
        num_hidden_layers=8,
        num_attention_heads=_HEADS,
        num_key_value_heads=_KV_HEADS,
        head_dim=_HEAD_DIM,
        intermediate_size=384,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=tokenizer.token_to_id(EOS),
        pad_token_id=tokenizer.token_to_id(PAD),
    )
    model = LlamaForCausalLM(config)
    # Training needs the attention weights. It is also half as fast again as the fused kernel, whose backward pass
    # dominates on CPUs at these lengths.
    model.set_attn_implementation("eager")
    # Rows much larger than the default 0.02, so that the noise after the first block does not drown the words.
    nn.init.normal_(model.model.embed_tokens.weight, std=0.5)
    _start_by_matching(model)
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=config.bos_token_id,
        eos_token_id=[config.eos_token_id, tokenizer.token_to_id(END)],
        pad_token_id=config.pad_token_id,
        do_sample=False,
    )
    return model


def write_model(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Write the model folder in bfloat16, each file complete before it takes its name."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as name:
        folder = Path(name)
        stored = LlamaForCausalLM(model.config)
        stored.load_state_dict(model.state_dict())
        stored.generation_config = model.generation_config
        nn.Module.to(stored, torch.bfloat16).save_pretrained(folder)
        save_tokenizer(tokenizer, folder, CONTEXT)
        for file in folder.iterdir():
            file.chmod(0o644)
            os.replace(file, out / file.name)


@torch.no_grad()
def _start_by_matching(model: LlamaForCausalLM) -> None:
    """Start every head as one that looks at the tokens most like its own, and copies them."""
    for layer in model.model.layers:
        attention = layer.self_attn
        nn.init.normal_(attention.k_proj.weight, std=0.0625)
        attention.q_proj.weight.copy_(_per_query_head(attention.k_proj.weight))
        nn.init.normal_(attention.v_proj.weight, std=0.0625)
        attention.o_proj.weight.copy_(0.5 * _per_query_head(attention.v_proj.weight).T)


def _per_query_head(weight: Tensor) -> Tensor:
    """A key or value projection [_KV_HEADS * _HEAD_DIM, hidden], each head repeated for the queries that share it."""
    heads = weight.view(_KV_HEADS, _HEAD_DIM, -1)
    return heads.repeat_interleave(_HEADS // _KV_HEADS, dim=0).flatten(0, 1)
