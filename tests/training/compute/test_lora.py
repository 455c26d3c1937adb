from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import TinyCheckpoint
from peft_oracle import ALL, peft_quiet
from split_chain import CPU, leaves, open_checkpoint, random_weights
from torch import Tensor, nn

from split_llama.config import BlockRange
from split_llama.layers import Block, FusedLinear
from split_llama.load import load_segment
from split_llama.lora import LoraConfig
from training.compute.lora import AdaptedBlock, DropoutKey, Group, leaves_of, take_gradients

KEY = DropoutKey(seed=1, client="a", step=2, micro=0)
Q_PROJ = "model.layers.0.self_attn.q_proj"


def draw(key: DropoutKey, name: str = Q_PROJ, rate: float = 0.1, rows: int = 500) -> Tensor:
    return key.mask(name, rows, 333, rate, CPU)


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_each_input_is_dropped_with_the_rate(rate: float) -> None:
    mask = draw(KEY, rate=rate)
    deviation = (rate * (1 - rate) / mask.numel()) ** 0.5
    assert mask.dtype == torch.bool
    assert abs(float((~mask).float().mean()) - rate) < 5 * deviation
    # No row and no column is favoured.
    assert abs(float(mask.float().mean(dim=0).std()) / (rate * (1 - rate) / 500) ** 0.5 - 1) < 0.2
    assert abs(float(mask.float().mean(dim=1).std()) / (rate * (1 - rate) / 333) ** 0.5 - 1) < 0.2


def test_a_mask_follows_from_its_key_and_name_alone() -> None:
    assert torch.equal(draw(KEY), draw(DropoutKey(1, "a", 2, 0)))
    # A longer batch begins with the same rows.
    assert torch.equal(draw(KEY), draw(KEY, rows=700)[:500])


def test_masks_of_other_keys_are_independent() -> None:
    keys = [KEY, DropoutKey(2, "a", 2, 0), DropoutKey(1, "b", 2, 0), DropoutKey(1, "a", 3, 0), DropoutKey(1, "a", 2, 1)]
    masks = [draw(key, rate=0.5) for key in keys] + [draw(KEY, "model.layers.0.self_attn.k_proj", rate=0.5)]
    for one, other in itertools.combinations(masks, 2):
        assert abs(float((one == other).float().mean()) - 0.5) < 0.01


@pytest.fixture
def block(tiny_checkpoint: TinyCheckpoint) -> Iterator[Block]:
    checkpoint = open_checkpoint(tiny_checkpoint())
    layer = load_segment(checkpoint, BlockRange(0, 1), dtype=torch.float32, device=CPU).layers[0]
    assert isinstance(layer, Block)
    yield layer
    assert all(matrix.low_rank is None for matrix in fused(layer)), "a test left an update behind"


def fused(block: Block) -> list[FusedLinear]:
    return [module for module in block.modules() if isinstance(module, FusedLinear)]


def group(folder_lora: LoraConfig, block: Block, rows: int, seed: int = 0) -> Group:
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}
    for name, module in block.named_modules():
        for part, outputs in module.parts.items() if isinstance(module, FusedLinear) else ():
            full = f"model.layers.0.{name.rpartition('.')[0]}.{part}"
            weights[f"{full}.lora_A.weight"] = torch.randn(folder_lora.r, module.width, generator=generator)
            weights[f"{full}.lora_B.weight"] = torch.randn(outputs, folder_lora.r, generator=generator)
    return Group((rows,), leaves(weights), KEY)


def test_dropout_keeps_the_mean_of_the_update(block: Block) -> None:
    """The kept inputs are scaled by 1 / (1 - rate), so that over many masks the update is that without dropout."""
    lora = LoraConfig(2, 4, dropout=0.2)
    one = group(lora, block, 3)
    x = torch.randn(3, 32)
    with torch.no_grad(), AdaptedBlock(0, block, LoraConfig(2, 4)).attached([one]):
        expected = block.self_attn.qkv_proj(x)
    adapted = AdaptedBlock(0, block, lora)
    draws = []
    for step in range(3000):
        with torch.no_grad(), adapted.attached([Group((3,), one.weights, DropoutKey(0, "a", step, 0))]):
            draws.append(block.self_attn.qkv_proj(x))
    stacked = torch.stack(draws)
    deviation = stacked.std(dim=0) / len(draws) ** 0.5
    assert ((stacked.mean(dim=0) - expected).abs() <= 5 * deviation + 1e-5).all()
    assert (stacked.std(dim=0) > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_matrix_equals_pefts_layer(dtype: torch.dtype) -> None:
    """The base in 16 bits, the adapter in 32: the types in between are PEFT's, so results are the same to the bit."""
    with peft_quiet():
        from peft import LoraConfig as PeftConfig
        from peft import get_peft_model

        base = nn.Module()
        base.o_proj = nn.Linear(48, 32, bias=True).to(dtype).requires_grad_(False)
        model = get_peft_model(base, PeftConfig(r=4, lora_alpha=8, target_modules=["o_proj"])).base_model.model
    matrix = FusedLinear(48, {"o_proj": 32}, True, dtype, CPU)
    assert matrix.weight is not None
    assert matrix.bias is not None
    matrix.weight.copy_(model.o_proj.base_layer.weight)
    matrix.bias.copy_(model.o_proj.base_layer.bias)
    theirs = {"lora_A": model.o_proj.lora_A["default"].weight, "lora_B": model.o_proj.lora_B["default"].weight}
    with torch.no_grad():
        theirs["lora_B"].normal_(generator=torch.Generator().manual_seed(0))
    assert theirs["lora_A"].dtype == torch.float32

    holder = nn.Module()
    holder.self_attn = nn.Module()
    holder.self_attn.o_proj = matrix
    ours = {f"model.layers.0.self_attn.o_proj.{half}.weight": weight for half, weight in theirs.items()}
    ours = leaves({name: weight.detach() for name, weight in ours.items()})
    x = torch.randn(9, 48, dtype=dtype)
    upstream = torch.randn(9, 32, dtype=dtype)
    x_ours, x_theirs = x.clone().requires_grad_(True), x.clone().requires_grad_(True)
    adapted = AdaptedBlock(0, holder, LoraConfig(4, 8, target_modules=("o_proj",)))
    with adapted.attached([Group((9,), ours)]):
        found = matrix(x_ours)
    expected = model.o_proj(x_theirs)
    assert found.dtype == expected.dtype == dtype
    # The order of two roundings in float32 may differ; in bfloat16 that shows in one last place at times.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found, expected, rtol=2 * eps, atol=eps)
    found.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(x_ours.grad, x_theirs.grad, rtol=4 * eps, atol=4 * eps)
    for leaf, weight in zip(ours.values(), theirs.values(), strict=True):
        torch.testing.assert_close(leaf.grad, weight.grad, rtol=1e-5, atol=1e-5)


def test_what_was_attached_before_is_put_back(block: Block) -> None:
    """Inference may use the same modules between two blocks of a pass, with updates of its own."""
    served = block.self_attn.qkv_proj
    served.low_rank = lambda x, out: out + 1
    before = served.low_rank
    plain = AdaptedBlock(0, block, None)
    x = torch.randn(2, 32)
    with plain.attached([Group((2,), {})]):
        assert torch.equal(served(x), served.multiply(x))
    assert served.low_rank is before

    adapted = AdaptedBlock(0, block, LoraConfig(2, 4, target_modules=ALL))

    def fail_inside() -> None:
        with adapted.attached([group(LoraConfig(2, 4), block, 2)]):
            assert all(matrix.low_rank is not None for matrix in fused(block))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert served.low_rank is before
    served.low_rank = None


def test_a_group_without_weights_has_the_base_alone(block: Block) -> None:
    lora = LoraConfig(2, 4)
    adapted = AdaptedBlock(0, block, lora)
    x = torch.randn(5, 32)
    with adapted.attached([Group((2,), {}), group(lora, block, 3)]), torch.no_grad():
        found = block.self_attn.qkv_proj(x)
        base = block.self_attn.qkv_proj.multiply(x)
    assert torch.equal(found[:2], base[:2])
    assert not torch.isclose(found[2:], base[2:]).all(dim=1).any()


def test_leaves_share_storage_and_part_gradients(tmp_path: Path) -> None:
    weights = {"w": torch.ones(2, 2)}
    one, other = leaves_of(weights), leaves_of(weights)
    (one["w"] * 2).sum().backward()
    assert other["w"].grad is None
    assert one["w"].data_ptr() == weights["w"].data_ptr()
    assert take_gradients(one)["w"].tolist() == [[2, 2], [2, 2]]
    assert one["w"].grad is None
    assert take_gradients(other)["w"].tolist() == [[0, 0], [0, 0]]


def test_weights_that_changed_after_the_forward_are_noticed(tiny_checkpoint: TinyCheckpoint, block: Block) -> None:
    """A stale forward must not go back through newer weights: its gradient would be of neither."""
    lora = LoraConfig(2, 4)
    checkpoint = open_checkpoint(tiny_checkpoint())
    shared = random_weights(checkpoint, lora)
    with AdaptedBlock(0, block, lora).attached([Group((2,), leaves_of(shared))]):
        out = block.self_attn.qkv_proj(torch.randn(2, 32, requires_grad=True))
    shared[f"{Q_PROJ}.lora_A.weight"].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
