"""Adapters by PEFT's names: configuration, shapes, folders both ways, and what is refused. PEFT is the oracle."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyCheckpoint
from peft_oracle import ALL, ATTENTION, load_peft, logits, peft_quiet, random_peft, write_random_adapter
from safetensors.torch import load_file, save_file

from split_llama.checkpoint import Checkpoint
from split_llama.config import BlockRange
from split_llama.errors import AdapterMismatch, CacheError, CheckpointError, UsageError
from split_llama.lora import (
    Adapter,
    LoraConfig,
    adapter_bytes,
    init_lora,
    lora_shapes,
    parse_adapter,
    read_adapter,
    write_adapter,
)

WHOLE = BlockRange(0, 4)
TOKENS = [1, 9, 77, 4, 200, 31, 5]


def peft_tensors(model: Any) -> dict[str, torch.Tensor]:
    with peft_quiet():
        from peft import get_peft_model_state_dict

        return {
            name.removeprefix("base_model.model."): tensor for name, tensor in get_peft_model_state_dict(model).items()
        }


def random_adapter(folder: Path, lora: LoraConfig, seed: int = 1) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    shapes = lora_shapes(Checkpoint.open(folder).config, lora, WHOLE)
    return Adapter(lora, {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()})


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ALL])
def test_names_shapes_and_order_are_pefts(tiny_checkpoint: TinyCheckpoint, family: str, targets: Any) -> None:
    folder = tiny_checkpoint(family=family)
    model = random_peft(folder, r=3, target_modules=list(targets))
    wanted = {name: tuple(tensor.shape) for name, tensor in peft_tensors(model).items()}
    found = lora_shapes(Checkpoint.open(folder).config, LoraConfig(3, 8, target_modules=targets), WHOLE)
    assert list(found.items()) == list(wanted.items())


def test_first_values_are_drawn_as_pefts_and_follow_from_seed_and_name(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint(hidden=64)
    config, lora = Checkpoint.open(folder).config, LoraConfig(16, 16, target_modules=ALL)
    first = init_lora(config, lora, WHOLE, seed=5)
    part = init_lora(config, lora, BlockRange(1, 3), seed=5)
    other = init_lora(config, lora, WHOLE, seed=6)
    with peft_quiet():
        from peft import LoraConfig as PeftConfig
        from peft import get_peft_model
        from peft_oracle import base_model

        theirs = peft_tensors(get_peft_model(base_model(folder), PeftConfig(r=16, target_modules=list(ALL))))
    assert list(part) == [name for name in first if ".1." in name or ".2." in name]
    for name, tensor in first.items():
        assert tensor.dtype == torch.float32
        assert name not in part or torch.equal(tensor, part[name])
        if "lora_B" in name:
            assert not tensor.any()
            continue
        assert not torch.equal(tensor, other[name])
        bound = 1 / math.sqrt(tensor.shape[1])
        assert tensor.abs().max() <= bound
        assert theirs[name].abs().max() <= bound, "PEFT draws from the same interval"
        assert abs(float(tensor.std()) - bound / math.sqrt(3)) < 0.1 * bound
    drawn = [tensor.flatten()[:8].tolist() for name, tensor in first.items() if "lora_A" in name]
    assert len({tuple(values) for values in drawn}) == len(drawn), "no two tensors share their values"


@pytest.mark.parametrize(
    "lora", [LoraConfig(4, 8), LoraConfig(2, 3.5, 0.1, ("down_proj", "q_proj"), True)], ids=["plain", "rslora"]
)
def test_peft_loads_a_folder_of_ours(tiny_checkpoint: TinyCheckpoint, tmp_path: Path, lora: LoraConfig) -> None:
    folder = tiny_checkpoint()
    adapter = random_adapter(folder, lora)
    write_adapter(tmp_path / "adapter", adapter, str(folder))
    loaded = load_peft(folder, tmp_path / "adapter")
    wanted = random_peft(
        folder,
        r=lora.r,
        alpha=lora.alpha,  # type: ignore[arg-type]
        target_modules=list(lora.target_modules),
        use_rslora=lora.use_rslora,
    )
    plain = logits(wanted, TOKENS)
    with torch.no_grad():
        for name, weight in wanted.named_parameters():
            if "lora_" in name:
                weight.copy_(adapter.tensors[name.removeprefix("base_model.model.").replace(".default", "")])
    assert torch.equal(logits(loaded, TOKENS), logits(wanted, TOKENS))
    assert not torch.equal(logits(loaded, TOKENS), plain)
    again = read_adapter(tmp_path / "adapter")
    assert again.lora == lora
    assert again.digest() == adapter.digest()


@pytest.mark.parametrize("more", [{}, {"use_rslora": True, "target_modules": list(ALL)}, {"bias": "none"}])
def test_a_folder_of_pefts_is_read(tiny_checkpoint: TinyCheckpoint, tmp_path: Path, more: dict[str, Any]) -> None:
    folder = tiny_checkpoint()
    write_random_adapter(tmp_path / "adapter", folder, r=3, alpha=7, lora_dropout=0.25, **more)
    adapter = read_adapter(tmp_path / "adapter")
    targets = tuple(more.get("target_modules", ATTENTION))
    assert adapter.lora == LoraConfig(3, 7, 0.25, targets, more.get("use_rslora", False))
    assert adapter.lora.scaling == pytest.approx(7 / (math.sqrt(3) if adapter.lora.use_rslora else 3))
    wanted = peft_tensors(load_peft(folder, tmp_path / "adapter"))
    assert set(adapter.tensors) == set(wanted)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in adapter.tensors.items())
    adapter.check(Checkpoint.open(folder).config)


def test_a_part_is_an_adapter_of_its_blocks(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    folder = tiny_checkpoint()
    adapter = random_adapter(folder, LoraConfig(4, 8))
    middle = adapter.part(BlockRange(1, 3))
    assert middle.blocks == (1, 2)
    assert adapter.part(BlockRange(3, 3)).tensors == {}
    middle.check(Checkpoint.open(folder).config)
    write_adapter(tmp_path / "middle", middle, str(folder))
    wanted = random_peft(folder)
    with torch.no_grad():
        for name, weight in wanted.named_parameters():
            if "lora_" in name:
                own = name.removeprefix("base_model.model.").replace(".default", "")
                weight.copy_(middle.tensors.get(own, torch.zeros_like(weight)))
    assert torch.equal(logits(load_peft(folder, tmp_path / "middle"), TOKENS), logits(wanted, TOKENS))
    assert middle.digest() == read_adapter(tmp_path / "middle").digest()


def test_an_adapter_travels_as_one_file(tiny_checkpoint: TinyCheckpoint) -> None:
    adapter = random_adapter(tiny_checkpoint(), LoraConfig(4, 8, 0.5, ALL, True))
    data = adapter_bytes(adapter, "base")
    again = parse_adapter(data, "here")
    assert (again.lora, again.digest()) == (adapter.lora, adapter.digest())
    for damaged in (data[:-1], data + b"x", data[:7], b"", b"\x80\x04" * 20):
        with pytest.raises(CheckpointError):
            parse_adapter(damaged, "here")


def test_the_digest_is_of_everything_that_decides(tiny_checkpoint: TinyCheckpoint) -> None:
    adapter = random_adapter(tiny_checkpoint(), LoraConfig(4, 8))
    one = next(iter(adapter.tensors))
    changed = dict(adapter.tensors) | {one: adapter.tensors[one] + 1}
    halved = {name: tensor.half() for name, tensor in adapter.tensors.items()}
    others = [
        Adapter(LoraConfig(4, 9), adapter.tensors),
        Adapter(adapter.lora, changed),
        Adapter(adapter.lora, halved),
        adapter.part(BlockRange(0, 3)),
    ]
    assert len({adapter.digest(), *(other.digest() for other in others)}) == 5
    assert Adapter(LoraConfig(4, 8, dropout=0.5), adapter.tensors).digest() == adapter.digest()


REFUSED = {
    "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"q_proj": 2},
    "use_dora": True,
    "bias": "lora_only",
    "modules_to_save": ["lm_head"],
    "lora_bias": True,
    "fan_in_fan_out": True,
    "trainable_token_indices": [1],
    "layer_replication": [[0, 2]],
    "exclude_modules": ["q_proj"],
    "init_lora_weights": "pissa",
    "something_new": 1,
    "peft_type": "IA3",
    "target_modules": "all-linear",
    "r": 0,
    "lora_alpha": "eight",
}


@pytest.mark.parametrize("field", REFUSED)
def test_other_maths_is_refused_by_name(field: str) -> None:
    raw = LoraConfig(4, 8).to_peft("base") | {field: REFUSED[field]}
    with pytest.raises(AdapterMismatch, match=r"rank" if field == "r" else field.removeprefix("lora_a")):
        LoraConfig.from_peft(raw)


@pytest.mark.parametrize(
    "wrong",
    [
        {"r": 0},
        {"r": True},
        {"r": 2.0},
        {"alpha": -1},
        {"alpha": math.nan},
        {"alpha": math.inf},
        {"dropout": 1.0},
        {"target_modules": ()},
        {"target_modules": ("q_proj", "q_proj")},
        {"target_modules": ("lm_head",)},
    ],
)
def test_impossible_values_are_wrong_usage(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        LoraConfig(**({"r": 4, "alpha": 8.0} | wrong))


def test_an_adapter_that_does_not_fit_is_refused(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint()
    config = Checkpoint.open(folder).config
    adapter = random_adapter(folder, LoraConfig(4, 8))
    adapter.check(config)
    one = "model.layers.2.self_attn.q_proj.lora_A.weight"
    cases = {
        "another rank": Adapter(LoraConfig(5, 8), adapter.tensors),
        "lacks": Adapter(adapter.lora, {name: t for name, t in adapter.tensors.items() if name != one}),
        "no place": Adapter(LoraConfig(4, 8, target_modules=ATTENTION[1:]), adapter.tensors),
        "finite": Adapter(adapter.lora, dict(adapter.tensors) | {one: adapter.tensors[one] * math.nan}),
    }
    matches = {"another rank": r"lora_A.weight has shape \(4, 32\); \(5, 32\)"}
    for what, wrong in cases.items():
        with pytest.raises(AdapterMismatch, match=matches.get(what, what)):
            wrong.check(config)
    wider = Checkpoint.open(tiny_checkpoint(hidden=64)).config
    with pytest.raises(AdapterMismatch, match="shape"):
        adapter.check(wider)
    shallower = Checkpoint.open(tiny_checkpoint(layers=3)).config
    with pytest.raises(AdapterMismatch, match="block 3; this model has 3 blocks"):
        adapter.check(shallower)


def test_folders_that_are_no_adapters_are_refused(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    folder = tiny_checkpoint()
    home = tmp_path / "adapter"
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        read_adapter(folder)
    write_adapter(home, random_adapter(folder, LoraConfig(4, 8)), "base")
    weights = home / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file(tensors | {"base_model.model.lm_head.weight": torch.zeros(2)}, weights)
    with pytest.raises(AdapterMismatch, match="lm_head"):
        read_adapter(home)
    save_file({name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}, weights)
    with pytest.raises(AdapterMismatch, match="named as PEFT"):
        read_adapter(home)
    weights.write_bytes(weights.read_bytes()[:-3])
    with pytest.raises((CheckpointError, AdapterMismatch)):
        read_adapter(home)
    weights.unlink()
    (home / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match="pickled"):
        read_adapter(home)
    (home / "adapter_config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="JSON object"):
        read_adapter(home)


def test_a_folder_is_never_a_mixture(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = random_adapter(tiny_checkpoint(), LoraConfig(4, 8))
    home, left = tmp_path / "adapter", ["adapter_model.safetensors", "notes.txt"]
    write_adapter(home, adapter, "base")
    (home / "notes.txt").write_text("mine")
    write_adapter(home, Adapter(LoraConfig(4, 2), adapter.tensors), "base")
    assert read_adapter(home).lora.alpha == 2
    assert json.loads((home / "adapter_config.json").read_text())["base_model_name_or_path"] == "base"
    assert sorted(path.name for path in home.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "notes.txt",
    ]

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CacheError, match="No space left"):
        write_adapter(home, adapter, "base")
    assert sorted(path.name for path in home.iterdir()) == left
    with pytest.raises(CheckpointError, match=r"no adapter_config\.json"):
        read_adapter(home)
