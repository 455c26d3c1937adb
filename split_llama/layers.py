"""The LLaMA-family blocks over ragged rows: RMSNorm, rotary, attention, MLP, block, segment, embedding and head.

Shapes: N rows of the batch (all sequences back to back, no padding), D hidden, H query heads, G key-value heads,
K head_dim, I intermediate, V vocabulary. A tensor's name carries its shape where it helps: `q_NHK`.

Module and parameter names follow transformers' Llama. Q, K and V, and gate and up, are stored fused; `stored_parts`
gives the checkpoint's names as views of that storage, so loading and training see `q_proj`, `k_proj`, ... of one copy.
`pack` then turns the matrices into what multiplies fastest (`split_llama.products`); the views are gone after that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from split_llama.config import BlockRange, ModelConfig, Rope
from split_llama.lora import LowRank
from split_llama.products import Numerics, Product


class BlockAttention(Protocol):
    """Attention of one pass in one block: stores the rows' K and V, and lets each query row see its own sequence."""

    def __call__(self, block: int, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:
        """Give the attention output `[N, H, K]`."""
        ...


# Rotary angles are tabulated for so many positions at first.
LEAST_ANGLES = 512


class BlockForward(Protocol):
    """The forward of one block."""

    def __call__(self, block: int, x_ND: Tensor, cos: Tensor, sin: Tensor, attend: BlockAttention) -> Tensor:
        """Give the block's output `[N, D]`; `block` is its number in the whole model."""
        ...


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """Make storage for weights that a checkpoint fills; frozen, for training leaves the base alone."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)


class RMSNorm(nn.Module):
    """Root mean square norm (Zhang and Sennrich 2019), computed in float32."""

    def __init__(self, width: int, eps: float, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = _empty((width,), dtype, device)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def inverse_frequencies(rope: Rope, head_dim: int) -> Tensor:
    """Rotary frequencies `[K / 2]`, float32; "llama3" scaling as in Meta's Llama 3.1 reference."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        return _llama3_frequencies(frequencies, rope)
    return frequencies


def _llama3_frequencies(frequencies: Tensor, rope: Rope) -> Tensor:
    """Keep short wavelengths, divide long ones by `factor`, and blend between the two bounds."""
    wavelengths = 2 * math.pi / frequencies
    context = rope.original_max_position_embeddings
    smooth = (context / wavelengths - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - smooth) * frequencies / rope.factor + smooth * frequencies
    long = wavelengths > context / rope.low_freq_factor
    short = wavelengths < context / rope.high_freq_factor
    return torch.where(long, frequencies / rope.factor, torch.where(short, frequencies, blended))


class RotaryEmbedding(nn.Module):
    """Rotary angles (Su et al. 2021) of given positions, from tables that grow with the positions asked for."""

    inverse_frequencies: Tensor
    cos: Tensor
    signed_sin: Tensor

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        super().__init__()
        frequencies = inverse_frequencies(config.rope, config.head_dim).to(device)
        for name in ("cos", "signed_sin"):
            self.register_buffer(name, torch.empty(0, 1, config.head_dim, device=device), persistent=False)
        self.register_buffer("inverse_frequencies", frequencies, persistent=False)

    def forward(self, positions_N: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Give what `rotate` takes, each `[N, 1, K]`: computed in float32, then cast."""
        last = int(positions_N.max())
        if last >= len(self.cos):
            self._tabulate(max(LEAST_ANGLES, 2 ** (last + 1).bit_length()))
        cos, signed_sin = self.cos.index_select(0, positions_N), self.signed_sin.index_select(0, positions_N)
        return cos.to(dtype), signed_sin.to(dtype)

    def _tabulate(self, positions: int) -> None:
        frequencies = self.inverse_frequencies
        # Whoever asks first, the tables serve training too.
        with torch.inference_mode(False):
            angles = torch.arange(positions, device=frequencies.device).float()[:, None] * frequencies
            cos, sin = angles.cos(), angles.sin()
            self.cos = torch.cat((cos, cos), dim=-1)[:, None, :]
            self.signed_sin = torch.cat((-sin, sin), dim=-1)[:, None, :]


def rotate(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Turn `[N, heads, K]` by the angles; the halves of K are the two coordinates (the Hugging Face layout).

    `signed_sin` holds the minus of the first coordinate's formula, so that the halves need only trade places.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), signed_sin)


class FusedLinear(nn.Module):
    """Several linear layers over the same input as one matrix, each part reachable under its own name."""

    def __init__(self, width: int, parts: dict[str, int], bias: bool, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        rows = sum(parts.values())
        self.parts = parts
        self.width = width
        self.weight: nn.Parameter | None = _empty((rows, width), dtype, device)
        self.bias = _empty((rows,), dtype, device) if bias else None
        self.product: Product | None = None
        # Adds adapters' updates, with their parts side by side as the outputs are; None where there are none.
        self.low_rank: LowRank | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Give all parts' outputs side by side, `[N, sum of parts]`."""
        out = self.multiply(x)
        return out if self.low_rank is None else self.low_rank(x, out)

    def multiply(self, x: Tensor) -> Tensor:
        """Give the outputs of the base weights alone."""
        if self.product is not None:
            return self.product(x)
        assert self.weight is not None, "a matrix is dense or packed"
        return F.linear(x, self.weight, self.bias)

    def pack(self, numerics: Numerics, stored: Tensor | None = None) -> None:
        """Keep the weights only as `numerics` says they multiply best, from now on.

        `stored` are weights `[out, D]` of any type that were not filled in yet.
        """
        assert self.weight is not None, "packed already"
        self.product = numerics.product(self.weight if stored is None else stored, self.bias)
        if self.product is not None:
            self.weight = None
        elif stored is not None:
            self.weight.copy_(stored)

    @property
    def product_bytes(self) -> int:
        """Bytes of weights that one product reads."""
        if self.product is not None:
            return self.product.nbytes
        assert self.weight is not None, "a matrix is dense or packed"
        return self.weight.nbytes

    def stored_parts(self) -> Iterator[tuple[str, Tensor]]:
        """Yield `(name, view)` for the weight and bias of each part, as long as they are not packed."""
        assert self.weight is not None, "a packed matrix has no views"
        start = 0
        for name, rows in self.parts.items():
            yield f"{name}.weight", self.weight[start : start + rows]
            if self.bias is not None:
                yield f"{name}.bias", self.bias[start : start + rows]
            start += rows


class Attention(nn.Module):
    """Grouped-query attention with rotary positions, and with Qwen3's norm of Q and K where the model has it."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        q_width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.rotated = config.num_attention_heads + config.num_key_value_heads
        self.heads = [config.num_attention_heads, config.num_key_value_heads]
        self.head_dim = config.head_dim
        qkv = {"q_proj": q_width, "k_proj": kv_width, "v_proj": kv_width}
        self.qkv_proj = FusedLinear(config.hidden_size, qkv, config.qkv_bias, dtype, device)
        self.o_proj = FusedLinear(q_width, {"o_proj": config.hidden_size}, config.output_bias, dtype, device)
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, dtype, device)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, dtype, device)

    def forward(self, block: int, x_ND: Tensor, cos: Tensor, sin: Tensor, attend: BlockAttention) -> Tensor:
        """Give the attention output `[N, D]`."""
        qkv_NXK = self.qkv_proj(x_ND).view(len(x_ND), -1, self.head_dim)
        # Q and K turn together: on a CPU a block's time goes into the number of operations as much as their size.
        qk_NXK, v_NGK = qkv_NXK[:, : self.rotated], qkv_NXK[:, self.rotated :]
        if self.q_norm is not None and self.k_norm is not None:
            q_NHK, k_NGK = torch.split(qk_NXK, self.heads, dim=1)
            qk_NXK = torch.cat((self.q_norm(q_NHK), self.k_norm(k_NGK)), dim=1)
        q_NHK, k_NGK = torch.split(rotate(qk_NXK, cos, sin), self.heads, dim=1)
        return self.o_proj(attend(block, q_NHK, k_NGK, v_NGK).flatten(1))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """SwiGLU feed-forward (Shazeer 2020)."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        parts = {"gate_proj": config.intermediate_size, "up_proj": config.intermediate_size}
        self.gate_up_proj = FusedLinear(config.hidden_size, parts, config.mlp_bias, dtype, device)
        down = {"down_proj": config.hidden_size}
        self.down_proj = FusedLinear(config.intermediate_size, down, config.mlp_bias, dtype, device)

    def forward(self, x_ND: Tensor) -> Tensor:
        """Give the feed-forward output `[N, D]`."""
        gate, up = self.gate_up_proj(x_ND).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)  # type: ignore[no-any-return]


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, device)
        self.self_attn = Attention(config, dtype, device)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, device)
        self.mlp = MLP(config, dtype, device)

    def forward(self, block: int, x_ND: Tensor, cos: Tensor, sin: Tensor, attend: BlockAttention) -> Tensor:
        """Give the block's output `[N, D]`; `block` is its number in the whole model."""
        x_ND = x_ND + self.self_attn(block, self.input_layernorm(x_ND), cos, sin, attend)
        return x_ND + self.mlp(self.post_attention_layernorm(x_ND))  # type: ignore[no-any-return]

    def pack(self, numerics: Numerics) -> None:
        """Pack every matrix; see `FusedLinear.pack`."""
        for module in self.modules():
            if isinstance(module, FusedLinear):
                module.pack(numerics)

    @property
    def product_bytes(self) -> int:
        """Bytes of weights that one pass reads."""
        return sum(module.product_bytes for module in self.modules() if isinstance(module, FusedLinear))

    def stored_parts(self) -> Iterator[tuple[str, Tensor]]:
        """Yield `(name below model.layers.N, view of the storage)` for every tensor of a checkpoint's block."""
        for name, module in self.named_modules():
            if isinstance(module, RMSNorm):
                yield f"{name}.weight", module.weight
            elif isinstance(module, FusedLinear):
                parent = name.rpartition(".")[0]
                yield from ((f"{parent}.{part}", view) for part, view in module.stored_parts())


class Segment(nn.Module):
    """The blocks `[start, stop)` of a model; A, B and C are segments. `dtype` is that of states, norms and KV.

    `layers` own the weights, and `forwards` run them: the layers themselves, or what was made of them for inference.
    """

    def __init__(
        self,
        config: ModelConfig,
        blocks: BlockRange,
        *,
        dtype: torch.dtype,
        device: torch.device,
        layers: Iterable[Block] | None = None,
    ) -> None:
        """Hold `layers`, one per block, or else new ones whose weights are yet to be filled in."""
        super().__init__()
        self.config = config
        self.blocks = blocks
        self.dtype = dtype
        self.device = device
        self.rotary = RotaryEmbedding(config, device)
        self.layers = nn.ModuleList(layers or (Block(config, dtype, device) for _ in range(len(blocks))))
        assert len(self.layers) == len(blocks), "one layer per block"
        self.forwards: list[BlockForward] = list(self.layers)

    def forward(self, span: BlockRange, x_ND: Tensor, positions_N: Tensor, attend: BlockAttention) -> Tensor:
        """Run rows `[N, D]` with rotary positions `[N]` through the blocks of `span`, which this segment contains."""
        cos, sin = self.rotary(positions_N, x_ND.dtype)
        for block in range(span.start, span.stop):
            x_ND = self.forwards[block - self.blocks.start](block, x_ND, cos, sin, attend)
        return x_ND

    @property
    def product_bytes(self) -> int:
        """Bytes of weights that one pass through all blocks reads."""
        return sum(layer.product_bytes for layer in self.layers if isinstance(layer, Block))

    def stored_parts(self) -> Iterator[tuple[str, Tensor]]:
        """Yield `(checkpoint name, view of the storage)` for every tensor of this segment."""
        for index, layer in zip(range(self.blocks.start, self.blocks.stop), self.layers, strict=True):
            assert isinstance(layer, Block)
            yield from ((f"model.layers.{index}.{name}", view) for name, view in layer.stored_parts())


class Embedding(nn.Module):
    """Token ids `[N]` to rows `[N, D]` in the compute type; the table may be of another type."""

    def __init__(self, table_VD: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(table_VD, requires_grad=False)
        self.dtype = dtype

    def forward(self, token_ids_N: Tensor) -> Tensor:
        """Look the rows up."""
        return F.embedding(token_ids_N, self.weight).to(self.dtype)


class Head(nn.Module):
    """The final norm and the LM head: rows `[N, D]` to float32 logits `[N, V]`."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, device)
        self.lm_head = FusedLinear(config.hidden_size, {"lm_head": config.vocab_size}, False, dtype, device)

    def forward(self, x_ND: Tensor) -> Tensor:
        """Give the logits."""
        return self.lm_head(self.norm(x_ND)).float()  # type: ignore[no-any-return]

    def stored_parts(self) -> Iterator[tuple[str, Tensor]]:
        """Yield checkpoint names and storage; a tied checkpoint has the head under the embedding's name."""
        yield "model.norm.weight", self.norm.weight
        yield from self.lm_head.stored_parts()
