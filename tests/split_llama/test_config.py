"""Geometry and partition: what is read, what is refused, and transformers as the oracle for rotary frequencies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, TinyModel

from split_llama.config import BlockRange, ModelConfig, Partition, Rope
from split_llama.errors import UnsupportedModel, UsageError
from split_llama.layers import inverse_frequencies


def llama(**fields: Any) -> dict[str, Any]:
    return TinyModel().config() | fields


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_written_by_transformers_means_the_same(family: str) -> None:
    from transformers import AutoConfig

    raw = TinyModel(family=family).config()
    rewritten = AutoConfig.for_model(**raw).to_dict()
    assert ModelConfig.from_hf(rewritten) == ModelConfig.from_hf(raw)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"model_type": "gemma2"}, "model_type 'gemma2'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type 'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "attention_factor": 2.0}}, "attention_factor"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"residual_multiplier": 0.2}, "residual_multiplier"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"pretraining_tp": 2}, "pretraining_tp"),
        ({"sliding_window": 8}, "sliding_window"),
        ({"num_key_value_heads": 3}, "grouped"),
        ({"head_dim": 7}, "even head_dim"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_types": ["chunked_attention"] * 4}, "layer_types"),
        ({"model_type": "qwen2", "attention_bias": True}, "attention_bias"),
        ({"model_type": "mistral", "mlp_bias": True}, "mlp_bias"),
    ],
)
def test_what_changes_the_maths_is_refused_by_name(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModel, match=named):
        ModelConfig.from_hf(llama(**fields))


def test_fields_that_change_nothing_pass() -> None:
    plain = ModelConfig.from_hf(llama())
    extra = {"torch_dtype": "bfloat16", "pretraining_tp": 1, "use_cache": True, "_name_or_path": "x", "new_field": None}
    assert ModelConfig.from_hf(llama(**extra)) == plain


def test_the_geometry_digest_tells_models_apart() -> None:
    digests = {
        ModelConfig.from_hf(llama(**f)).geometry_digest() for f in ({}, {"rms_norm_eps": 1e-6}, {"vocab_size": 9})
    }
    assert len(digests) == 3


@pytest.mark.parametrize(
    "rope",
    [
        Rope(theta=500000.0),
        Rope(theta=10000.0, kind="linear", factor=4.0),
        Rope(500000.0, "llama3", 8.0, 1.0, 4.0, 8192),
        Rope(10000.0, "llama3", 32.0, 1.0, 4.0, 64),
    ],
)
def test_rotary_frequencies_equal_transformers(rope: Rope) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.kind != "default":
        parameters["factor"] = rope.factor
    if rope.kind == "llama3":
        parameters |= {
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_position_embeddings,
        }
    config = LlamaConfig(head_dim=64, rope_parameters=parameters, max_position_embeddings=131072)
    want = LlamaRotaryEmbedding(config).inv_freq
    torch.testing.assert_close(inverse_frequencies(rope, 64), want, rtol=1e-6, atol=0)


def test_a_partition_cuts_the_model_in_three() -> None:
    partition = Partition.parse("2,1")
    assert (partition.segment_a(8), partition.segment_b(8), partition.segment_c(8)) == (
        BlockRange(0, 2),
        BlockRange(2, 7),
        BlockRange(7, 8),
    )
    assert str(partition) == "2,1"


@pytest.mark.parametrize("text", ["", "1", "a,b", "1,2,3", "-1,1", "1.5,1"])
def test_a_malformed_partition_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        Partition.parse(text)


def test_a_partition_must_leave_the_server_a_block() -> None:
    with pytest.raises(UsageError, match=r"6 blocks.*below 6"):
        Partition(3, 3).segment_b(6)
