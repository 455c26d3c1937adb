"""Each kernel against its reference, on any device: tests/kernels runs these in the interpreter, tests/gpu on CUDA."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

import kernels.cache_edits.kernel as edits
import kernels.cache_edits.reference as edits_reference
import kernels.frame_codec.kernel as frames
import kernels.grouped_lora.reference as lora_reference
import kernels.rms_norm.reference as norm_reference
import kernels.rotary_write.reference as rotary_reference
import kernels.silu_mul.reference as silu_reference
from kernels.grouped_lora.kernel import grouped_lora
from kernels.kv_pages import QUANTISED_MAX, KVPages, dequantise, quantise
from kernels.rms_norm.kernel import add_rms_norm
from kernels.rotary_write.kernel import rotary_write
from kernels.runtime import interpreting
from kernels.silu_mul.kernel import silu_mul
from split_llama.wire import codec as wire

Case = dict[str, Any]
LARGEST = float(np.finfo(np.float32).max)


def normal(*shape: int, dtype: torch.dtype, device: str, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Random numbers that depend on the seed and the shape alone."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale
    return values.to(device=device, dtype=dtype)


def poisoned(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    """An output that shows what was left unwritten."""
    return torch.full(shape, float("nan"), dtype=dtype, device=device)


def exact(dtype: torch.dtype) -> bool:
    """Whether stored values are rounded as on a GPU: the interpreter cuts bf16 off instead of rounding it."""
    return dtype != torch.bfloat16 or not interpreting()


def assert_near(actual: Tensor, expected: Tensor, units: float) -> None:
    """Within so many units in the last place of the dtype, of the value or of 1 where that is larger."""
    unit = torch.finfo(actual.dtype).eps * units * (1 if exact(actual.dtype) else 2)
    torch.testing.assert_close(actual, expected, rtol=unit, atol=unit)


def check_silu_mul(device: str, dtype: torch.dtype, rows: int, width: int) -> None:
    gate_up = normal(rows, 2 * width, dtype=dtype, device=device, scale=20)
    gate_up[0, :2] = torch.tensor([-300.0, 300.0])
    ours, expected = (poisoned(rows, width, dtype=dtype, device=device) for _ in range(2))
    silu_mul(gate_up, ours)
    silu_reference.silu_mul(gate_up, expected)
    assert_near(ours, expected, 2)


def check_rms_norm(device: str, dtype: torch.dtype, rows: int, width: int, add: bool, keep: bool) -> None:
    x = normal(rows, width, dtype=dtype, device=device, scale=3)
    residual = normal(rows, width, dtype=dtype, device=device, seed=1) if add else None
    weight = normal(width, dtype=dtype, device=device, seed=2)
    outputs: list[Tensor | None] = [poisoned(rows, width, dtype=dtype, device=device) for _ in range(4)]
    if not keep:
        outputs[2] = outputs[3] = None
    ours, expected, our_sum, expected_sum = outputs
    assert ours is not None
    assert expected is not None
    add_rms_norm(x, residual, weight, 1e-5, out_ND=ours, residual_out_ND=our_sum)
    norm_reference.add_rms_norm(x, residual, weight, 1e-5, out_ND=expected, residual_out_ND=expected_sum)
    assert_near(ours, expected, 2)
    if our_sum is not None and expected_sum is not None:
        assert_near(our_sum, expected_sum, 0 if exact(dtype) else 1)


def pages_of(
    dtype: torch.dtype, pages: int, page_size: int, kv_heads: int, head_dim: int, device: str = "cpu", seed: int = 7
) -> KVPages:
    """Pages full of other sessions' numbers."""
    shape = (pages, page_size, kv_heads, head_dim)
    k, v = (normal(*shape, dtype=torch.float32, device=device, seed=seed + part) for part in range(2))
    if dtype not in QUANTISED_MAX:
        return KVPages(k.to(dtype), v.to(dtype))
    (k, k_scale), (v, v_scale) = (quantise(part, dtype) for part in (k, v))
    return KVPages(k, v, k_scale, v_scale)


def turned_units(dtype: torch.dtype) -> float:
    """How far turned values may be apart."""
    return 64 if dtype == torch.float32 else 2


def check_rotary_write(
    device: str, dtype: torch.dtype, storage: torch.dtype, *, rows: int, heads: int, kv_heads: int, head_dim: int,
    norm: bool = False, page_size: int = 8,
) -> None:  # fmt: skip
    qkv = normal(rows, heads + 2 * kv_heads, head_dim, dtype=dtype, device=device)
    qkv[0, heads] = 0
    positions = torch.arange(rows, dtype=torch.int32, device=device) * 977
    pages = rows // page_size + 2
    order = torch.randperm(pages * page_size, generator=torch.Generator().manual_seed(3))
    slots = order[:rows].clone().to(device)
    slots[rows // 2] = -1
    frequencies = (1 / 10000 ** (torch.arange(0, head_dim, 2) / head_dim)).to(device)
    norms = [normal(head_dim, dtype=dtype, device=device, seed=5 + part) if norm else None for part in range(2)]
    ours, expected = (pages_of(storage, pages, page_size, kv_heads, head_dim, device) for _ in range(2))
    our_q, expected_q = (poisoned(rows, heads, head_dim, dtype=dtype, device=device) for _ in range(2))
    shape: Case = {"heads": heads, "kv_heads": kv_heads, "q_norm": norms[0], "k_norm": norms[1], "eps": 1e-6}
    rotary_write(qkv, positions, slots, frequencies, ours, **shape, q_out_NHK=our_q)
    rotary_reference.rotary_write(qkv, positions, slots, frequencies, expected, **shape, q_out_NHK=expected_q)
    # Cosines of two libraries differ in the last bits of float32.
    assert_near(our_q, expected_q, turned_units(dtype))
    untouched = torch.ones(pages * page_size, dtype=torch.bool, device=device)
    untouched[slots[slots >= 0]] = False
    for mine, other in ((ours.k, expected.k), (ours.v, expected.v), (ours.k_scale, expected.k_scale)):
        if mine is not None and other is not None:
            kept = mine.flatten(0, 1).view(torch.uint8)[untouched]
            assert torch.equal(kept, other.flatten(0, 1).view(torch.uint8)[untouched])
    if storage not in QUANTISED_MAX:
        assert_near(ours.k, expected.k, turned_units(storage))
        assert_near(ours.v, expected.v, 0 if exact(storage) else 1)
        return
    assert ours.k_scale is not None
    assert ours.v_scale is not None
    # V is stored as it came: not a bit may differ. A turned K may differ in its last bits, and so by one level.
    assert torch.equal(ours.v.view(torch.uint8), expected.v.view(torch.uint8))
    assert torch.equal(ours.v_scale, expected.v_scale)  # type: ignore[arg-type]
    torch.testing.assert_close(ours.k_scale, expected.k_scale, rtol=1e-5, atol=0)
    mine, other = (dequantise(kv.k, kv.k_scale) for kv in (ours, expected))
    step = ours.k_scale[..., None] * (1.001 if storage == torch.int8 else 32.001)
    assert ((mine - other).abs() <= step).all()
    different = (ours.k.view(torch.uint8) != expected.k.view(torch.uint8)).float().mean()
    assert different < 1e-3


def hard_rows(width: int) -> torch.Tensor:
    """Ties, saturation, subnormals and zero groups of every codec, and rows of ordinary states."""
    hard = [
        *[1 + 2.0**-8, 1 + 3 * 2.0**-8, -(1 + 2.0**-8), 1 + 2.0**-11, 1 + 3 * 2.0**-11, 0.0, -0.0],
        *[2.0**-149, 3 * 2.0**-149, -(2.0**-127), 2.0**-25, 3 * 2.0**-25, 2.0**-24, 2.0**-15 + 2.0**-26],
        *[wire.FP16_MAX, wire.FP16_MAX + 16, 65520.0, -70000.0, wire.BF16_MAX, LARGEST, -LARGEST],
    ]
    rows = normal(6, width, dtype=torch.float32, device="cpu", scale=0.02)
    rows[1] = torch.tensor(hard).repeat(width // len(hard) + 1)[:width]
    # int8 levels that are halves, of a scale that is 1: 0.5, 1.5, 2.5 ...
    rows[2] = torch.arange(width) % 127 - 63 + 0.5
    rows[2, ::64] = 127
    rows[3] = 0
    rows[4] = torch.tensor(hard)[:14].repeat(width // 14 + 1)[:width] * 2.0**-10
    rows[5, -1] = 3e38
    return rows


def frame_layout(codecs: list[int], width: int, aligned: bool) -> tuple[list[int], int]:
    """Offsets of rows of these codecs with gaps between them (odd ones unless `aligned`), and the bytes in all."""
    offsets, end = [], 0 if aligned else 1
    for codec in codecs:
        offsets.append(end)
        end += wire.row_bytes(wire.Codec(max(codec, 0)), width) + (0 if aligned else 1)
        end += -end % 16 if aligned else 1 - end % 2
    return offsets, end


def check_encode(device: str, states: Tensor, codecs: list[int], aligned: bool) -> None:
    """Reply rows in reverse order of the states; every byte as the host's codec writes it, every other untouched."""
    count, width = states.shape
    rows = [row % count for row in reversed(range(len(codecs)))]
    offsets, total = frame_layout(codecs, width, aligned)
    payload = torch.full((total,), 0xA5, dtype=torch.uint8, device=device)
    bad = torch.zeros(len(codecs), dtype=torch.int32, device=device)
    numbers = (torch.tensor(rows, dtype=torch.int32), torch.tensor(offsets), torch.tensor(codecs, dtype=torch.int32))
    frames.encode_rows(states, *(part.to(device) for part in numbers), payload, bad, aligned=aligned)
    wide = states.float().cpu().numpy()
    expected = np.full(total, 0xA5, np.uint8)
    for row, offset, codec in zip(rows, offsets, codecs, strict=True):
        if codec >= 0:
            encoded = wire.encode_rows(wire.Codec(codec), wide[row : row + 1])
            expected[offset : offset + len(encoded)] = np.frombuffer(encoded, np.uint8)
    np.testing.assert_array_equal(payload.cpu().numpy(), expected)
    assert not bad.any()


def check_flags(device: str) -> None:
    """Rows with NaN or infinity are flagged, wherever in the row it is, and no others."""
    codecs, sources = [3, 2, -1, 1, 0], [1, 0, 3, 3, 2]
    offsets, total = frame_layout(codecs, 80, aligned=False)
    numbers = (torch.tensor(sources, dtype=torch.int32), torch.tensor(offsets), torch.tensor(codecs, dtype=torch.int32))
    for value in (float("nan"), float("inf"), -float("inf")):
        states = normal(5, 80, dtype=torch.float32, device=device)
        states[1, 79] = states[3, 0] = value
        bad = torch.zeros(5, dtype=torch.int32, device=device)
        payload = torch.zeros(total, dtype=torch.uint8, device=device)
        frames.encode_rows(states, *(part.to(device) for part in numbers), payload, bad)
        assert bad.tolist() == [1, 0, 0, 1, 0]


def check_decode(device: str, dtype: torch.dtype, states: Tensor, codecs: list[int], aligned: bool) -> None:
    """Rows as the host's codec encoded them; decoded as it decodes them, then cast. -1 leaves a row alone."""
    width = states.shape[1]
    offsets, total = frame_layout(codecs, width, aligned)
    payload = np.full(total, 0xFF, np.uint8)
    expected = torch.full((len(codecs), width), -5.0)
    for row, (offset, codec) in enumerate(zip(offsets, codecs, strict=True)):
        if codec >= 0:
            encoded = wire.encode_rows(wire.Codec(codec), states[row : row + 1].numpy())
            payload[offset : offset + len(encoded)] = np.frombuffer(encoded, np.uint8)
            wire.decode_rows(wire.Codec(codec), encoded, expected[row : row + 1].numpy())
    out = torch.full((len(codecs), width), -5.0, dtype=dtype, device=device)
    bad = torch.zeros(len(codecs), dtype=torch.int32, device=device)
    numbers = (torch.tensor(offsets), torch.tensor(codecs, dtype=torch.int32))
    frames.decode_rows(
        torch.from_numpy(payload).to(device), *(part.to(device) for part in numbers), out, bad_N=bad, aligned=aligned
    )
    assert not bad.any()
    if exact(dtype):
        assert torch.equal(out, expected.to(device=device, dtype=dtype))
    else:
        assert_near(out, expected.to(dtype), 1)


def check_grouped_lora(
    device: str, dtype: torch.dtype, adapter: list[int], rank: int, inputs: int, outputs: int, adapters: int = 4
) -> None:
    rows = len(adapter)
    x = normal(rows, inputs, dtype=dtype, device=device)
    a = normal(adapters, rank, inputs, dtype=dtype, device=device, seed=1, scale=inputs**-0.5)
    b = normal(adapters, outputs, rank, dtype=dtype, device=device, seed=2, scale=rank**-0.5)
    scaling = torch.arange(1, adapters + 1, dtype=torch.float32, device=device) / 2
    ours = normal(rows, outputs, dtype=dtype, device=device, seed=3)
    before, expected = ours.clone(), ours.clone()
    without = torch.tensor(adapter, device=device) < 0
    # Rows without an adapter must not be read either.
    x[without] = float("nan")
    numbers = torch.tensor(adapter, dtype=torch.int32, device=device)
    grouped_lora(x, a, b, numbers, scaling, ours)
    lora_reference.grouped_lora(x, a, b, numbers, scaling, expected)
    assert torch.equal(ours[without], before[without])
    assert_near(ours, expected, 64 if dtype == torch.float32 else 8)


def check_cache_edits(
    device: str, storage: torch.dtype, *, blocks: int, page_size: int, kv_heads: int, head_dim: int
) -> None:
    """Moves that overlap, a copy of part of a page, clears, and padding, one after the other."""
    pages = 6
    layers = [pages_of(storage, pages, page_size, kv_heads, head_dim, device, seed=block) for block in range(blocks)]
    names = ("k", "v", "k_scale", "v_scale") if storage in QUANTISED_MAX else ("k", "v")
    caches: list[dict[str, Tensor]] = []
    for _ in range(2):
        bytes_of = {name: [getattr(layer, name).view(torch.uint8) for layer in layers] for name in names}
        caches.append(
            {name: torch.stack(parts).view(getattr(layers[0], name).dtype) for name, parts in bytes_of.items()}
        )
    # The first sequence moves a chain in which targets are sources of others; the second has fewer moves.
    first = [page_size + slot for slot in range(1, page_size)]
    second = [3 * page_size + 4, 3 * page_size + 1]
    sources = torch.tensor([first, second + [-1] * (len(first) - 2)])
    targets = torch.tensor([[slot - 1 for slot in first], second[::-1] + [-1] * (len(first) - 2)])
    copies = torch.tensor([[1, 0, page_size - 3], [3, 4, page_size], [2, -1, page_size]])
    cleared = torch.tensor([2, -1, 5])
    for cache, backend in zip(caches, (edits, edits_reference), strict=True):
        backend.move_slots(sources_SE=sources.to(device), targets_SE=targets.to(device), **cache)
        backend.copy_page(copies_C3=copies.to(device), **cache)
        backend.zero_pages(pages_Z=cleared.to(device), **cache)
    for name in names:
        assert torch.equal(caches[0][name].view(torch.uint8), caches[1][name].view(torch.uint8)), name
    assert not caches[0]["k"][:, cleared[cleared >= 0].to(device)].float().any()


def check_far_edits(device: str, pages: int) -> None:
    """Edits of the last page of so many of 16 slots of 1,024 bytes, in the second of two blocks."""
    # On a CPU, memory that nothing touches is never there.
    k, v = (torch.empty(2, pages, 16, 8, 128, dtype=torch.int8, device=device) for _ in range(2))
    k[:, -2:], v[:, -2:] = 0, 0
    k[1, -1], v[1, -1] = 1, 2
    last = (pages - 1) * 16
    edits.copy_page(k, v, torch.tensor([[pages - 1, pages - 2, 9]], device=device))
    assert k[1, -2, :9].eq(1).all()
    assert v[1, -2, :9].eq(2).all()
    assert not k[1, -2, 9:].any()
    edits.zero_pages(k, v, torch.tensor([pages - 1], device=device))
    edits.move_slots(k, v, torch.tensor([[last - 16]], device=device), torch.tensor([[last + 15]], device=device))
    assert not v[1, -1, :15].any()
    assert v[1, -1, 15].eq(2).all()
    assert not k[0, -2:].any()


def check_benchmark(name: str) -> None:
    """The benchmark's script runs, here with tiny sizes, and says what was moved how fast beside the composite."""
    rows = importlib.import_module(f"benchmarks.kernels.{name}").measure(torch.device("cpu"), quick=True)
    assert rows
    for row in rows:
        assert row["bytes"] > 0
        assert row["microseconds"] > 0
        assert row["composite_microseconds"] > 0
        assert row["copy_share"] > 0
