"""The forward of a segment over fused kernels: the maths of `split_llama.layers.Block`, without its detours.

Shapes: N rows of the batch, D hidden, H query heads, G key-value heads, K head_dim, X = H + 2G, I intermediate.
The sum of the residual stream and a branch is left to the norm behind it, which makes it in the same pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.kv_pages import KVPages
from kernels.paged_attention.launch import AttentionInputs, Scratch, paged_attention
from kernels.paged_attention.planner import Tiles
from kernels.rms_norm.kernel import add_rms_norm
from kernels.rotary_write.kernel import rotary_write
from kernels.silu_mul.kernel import silu_mul
from serving.device.adapters import DeviceAdapters
from split_llama.config import BlockRange
from split_llama.layers import MLP, Attention, Block, FusedLinear, RMSNorm, Segment


@dataclass(frozen=True, slots=True)
class AttentionLaunch:
    """One launch of attention: the work items of the runs of one class."""

    inputs: AttentionInputs
    tiles: Tiles
    scratch: Scratch


@dataclass(frozen=True, slots=True)
class BlockInputs:
    """What the blocks need besides the rows, on the device.

    `positions` int32 `[N]` are rotary positions; `slots` int64 `[N]` where K and V go, -1 for nowhere. `launches` has
    an entry per distinct window. `passes_by` bool `[blocks of the span, N, 1]` says which rows a block leaves alone;
    `None` where it changes all of them. `adapters` int32 `[N]` are the numbers of the rows' adapters, -1 for none;
    `None` where no row has one.
    """

    positions: Tensor
    slots: Tensor
    launches: Mapping[int, Sequence[AttentionLaunch]]
    passes_by: Tensor | None = None
    adapters: Tensor | None = None


@dataclass(frozen=True, slots=True)
class _Pass:
    """One pass on its way: everything that its blocks share. `queries`, `attended` `[N, H, K]` are reused by each."""

    segment: Segment
    pages: Sequence[KVPages]
    inputs: BlockInputs
    queries: Tensor
    attended: Tensor
    adapters: DeviceAdapters | None

    def multiply(self, linear: FusedLinear, x_ND: Tensor) -> Tensor:
        """Give a matrix's outputs, with the rows' adapters."""
        out_NO = linear.multiply(x_ND)
        if self.adapters is not None and self.inputs.adapters is not None:
            self.adapters.add(linear, x_ND, self.inputs.adapters, out_NO)
        return out_NO


def run_blocks(
    segment: Segment,
    span: BlockRange,
    x_ND: Tensor,
    inputs: BlockInputs,
    pages: Sequence[KVPages],
    adapters: DeviceAdapters | None = None,
) -> Tensor:
    """Run rows `[N, D]` through the blocks of `span`; `pages` has an entry per block of the segment.

    `adapters` are those that `inputs.adapters` numbers. `x_ND` is left as it is. Nothing here waits for the device.
    """
    config = segment.config
    shape = (len(x_ND), config.num_attention_heads, config.head_dim)
    # Rows that no work item covers (padding) stay zero instead of turning into whatever the memory held.
    attended_NHK = x_ND.new_zeros(shape)
    one_pass = _Pass(segment, pages, inputs, torch.empty_like(attended_NHK), attended_NHK, adapters)
    stream_ND, branch_ND, normed_ND = x_ND, None, torch.empty_like(x_ND)
    for place, block in enumerate(range(span.start, span.stop)):
        layer = segment.layers[block - segment.blocks.start]
        assert isinstance(layer, Block)
        stream_ND = _norm(layer.input_layernorm, branch_ND, stream_ND, normed_ND)
        branch_ND = _for_participants(place, inputs, _attention(one_pass, block, layer.self_attn, normed_ND))
        stream_ND = _norm(layer.post_attention_layernorm, branch_ND, stream_ND, normed_ND)
        branch_ND = _for_participants(place, inputs, _mlp(one_pass, layer.mlp, normed_ND))
    return stream_ND if branch_ND is None else stream_ND + branch_ND


def _norm(norm: RMSNorm, branch_ND: Tensor | None, stream_ND: Tensor, normed_ND: Tensor) -> Tensor:
    """Write the norm of stream + branch, and give that sum, which takes the branch's place in memory."""
    if branch_ND is None:
        add_rms_norm(stream_ND, None, norm.weight, norm.eps, out_ND=normed_ND)
        return stream_ND
    add_rms_norm(branch_ND, stream_ND, norm.weight, norm.eps, out_ND=normed_ND, residual_out_ND=branch_ND)
    return branch_ND


def _attention(one_pass: _Pass, block: int, attention: Attention, x_ND: Tensor) -> Tensor:
    config, inputs = one_pass.segment.config, one_pass.inputs
    pages = one_pass.pages[block - one_pass.segment.blocks.start]
    qkv_NXK = one_pass.multiply(attention.qkv_proj, x_ND).view(len(x_ND), -1, config.head_dim)
    rotary_write(
        qkv_NXK,
        inputs.positions,
        inputs.slots,
        one_pass.segment.rotary.inverse_frequencies,
        pages,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        q_norm=None if attention.q_norm is None else attention.q_norm.weight,
        k_norm=None if attention.k_norm is None else attention.k_norm.weight,
        eps=config.rms_norm_eps,
        q_out_NHK=one_pass.queries,
    )
    attend(block, one_pass.segment, one_pass.queries, pages, inputs, one_pass.attended)
    return one_pass.multiply(attention.o_proj, one_pass.attended.flatten(1))


def attend(block: int, segment: Segment, q_NHK: Tensor, pages: KVPages, inputs: BlockInputs, out_NHK: Tensor) -> None:
    """Launch the attention of one block: every class of runs."""
    window = segment.config.sliding_windows[block]
    for launch in inputs.launches[window]:
        paged_attention(
            q_NHK,
            pages,
            launch.inputs,
            window=window,
            tiles=launch.tiles,
            scale=segment.config.head_dim**-0.5,
            scratch=launch.scratch,
            out_NHK=out_NHK,
        )


def _mlp(one_pass: _Pass, mlp: MLP, x_ND: Tensor) -> Tensor:
    gate_up_N2I = one_pass.multiply(mlp.gate_up_proj, x_ND)
    gated_NI = gate_up_N2I.new_empty((len(x_ND), gate_up_N2I.shape[1] // 2))
    silu_mul(gate_up_N2I, gated_NI)
    return one_pass.multiply(mlp.down_proj, gated_NI)


def _for_participants(place: int, inputs: BlockInputs, branch_ND: Tensor) -> Tensor:
    """Let rows that do not take part in a block pass it by: their branch adds nothing, whatever it came to."""
    return branch_ND if inputs.passes_by is None else branch_ND.masked_fill_(inputs.passes_by[place], 0.0)
