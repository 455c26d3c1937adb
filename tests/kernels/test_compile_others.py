"""Every kernel but attention compiles for sm_80 and sm_90: nothing spilled, shared memory under its ceiling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from tests.kernels.compile_offline import SHARED_CEILING, Build, Compiled, compile_all, table

LLAMA_8B = {"HEADS": 32, "KV_HEADS": 8, "HEAD_DIM": 128, "TILE": 16}
CACHE = {"k_ptr": "*i32", "v_ptr": "*i32"}
SCALES = {"k_scale_ptr": "*i32", "v_scale_ptr": "*i32"}
PAGES = {"k_ptr": "*bf16", "v_ptr": "*bf16"}


def build(kernel: str, label: str, signature: Mapping[str, str], warps: int = 4, **constexprs: Any) -> Build:
    return Build(f"kernels.{kernel}", signature, constexprs, num_warps=warps, label=f"{kernel.split(':')[1]} {label}")


def rotary(label: str, stored: str, largest: float, norm: bool, **geometry: int) -> Build:
    scaled = bool(largest)
    signature = {
        "qkv_ptr": "*bf16", "positions_ptr": "*i32", "slots_ptr": "*i64", "frequencies_ptr": "*fp32", "eps": "fp32",
        "q_out_ptr": "*bf16", "k_ptr": stored, "v_ptr": stored,
    }  # fmt: skip
    signature |= {"k_scale_ptr": "*fp32", "v_scale_ptr": "*fp32"} if scaled else {}
    signature |= {"q_norm_ptr": "*bf16", "k_norm_ptr": "*bf16"} if norm else {}
    absent = {
        name: None for name in ("q_norm_ptr", "k_norm_ptr", "k_scale_ptr", "v_scale_ptr") if name not in signature
    }
    numbers = {"NORM": norm, "LARGEST": largest, "FLOAT8": stored == "*u8"}
    return build(
        "rotary_write.kernel:rotary_write_kernel", label, signature, 2, **(LLAMA_8B | geometry), **numbers, **absent
    )


def frames(aligned: bool) -> list[Build]:
    places = {"offsets_ptr": "*i64", "codecs_ptr": "*i32", "payload_ptr": "*u8", "bad_ptr": "*i32"}
    label = "aligned" if aligned else "bytes"
    decode = build(
        "frame_codec.kernel:decode_rows_kernel", label, {**places, "out_ptr": "*bf16"},
        WIDTH=4096, COLUMNS=1024, ALIGNED=aligned, FLAG=True,
    )  # fmt: skip
    encode = build(
        "frame_codec.kernel:encode_rows_kernel", label, {**places, "states_ptr": "*bf16", "rows_ptr": "*i32"},
        WIDTH=4096, GROUPS=16, ALIGNED=aligned,
    )  # fmt: skip
    return [decode, encode]


def lora(rank: int) -> list[Build]:
    common = {"adapters_ptr": "*i32", "shrunk_ptr": "*fp32", "rows": "i32"}
    shrink = build(
        "grouped_lora.kernel:shrink_kernel", f"rank {rank}", {**common, "x_ptr": "*bf16", "a_ptr": "*bf16"},
        WIDTH=4096, RANK=rank, RANKS=max(rank, 16), PIECE=512, STEP=128, UPCAST=False,
    )  # fmt: skip
    expand = build(
        "grouped_lora.kernel:expand_kernel", f"rank {rank}",
        {**common, "b_ptr": "*bf16", "scaling_ptr": "*fp32", "out_ptr": "*bf16"},
        WIDTH=6144, RANK=rank, RANKS=max(rank, 16), PIECES=8, OUTPUTS=128, UPCAST=False,
    )  # fmt: skip
    return [shrink, expand]


def edits() -> list[Build]:
    numbers = {"WIDTH": 512, "MOVES": 64, "LANES": 64, "COLUMNS": 64}
    lists = {"sources_ptr": "*i64", "targets_ptr": "*i64", "slots": "i32"}
    absent = dict.fromkeys(SCALES)
    pages = {"edits_ptr": "*i64", "pages": "i32"}
    move, fill = "cache_edits.kernel:move_slots_kernel", "cache_edits.kernel:fill_pages_kernel"
    sizes = {"PAGE_SIZE": 16, "WIDTH": 512, "WORDS": 4096}
    return [
        build(move, "bf16", {**CACHE, **lists}, **numbers, SCALES=0, SCALE_COLUMNS=1, **absent),
        build(move, "scales", {**CACHE, **SCALES, **lists}, **numbers, SCALES=8, SCALE_COLUMNS=8),
        build(fill, "copy", {**CACHE, **SCALES, **pages}, **sizes, SCALES=8, CLEAR=False),
        build(fill, "clear", {**CACHE, **pages}, **sizes, SCALES=0, CLEAR=True, **absent),
    ]


NORM = {"x_ptr": "*bf16", "residual_ptr": "*bf16", "weight_ptr": "*bf16", "eps": "fp32", "out_ptr": "*bf16"}
BUILDS = [
    build("silu_mul.kernel:silu_mul_kernel", "", {"gate_up_ptr": "*bf16", "out_ptr": "*bf16"}, WIDTH=14336, BLOCK=1024),
    build(
        "rms_norm.kernel:add_rms_norm_kernel", "8192", {**NORM, "residual_out_ptr": "*bf16"}, 16,
        WIDTH=8192, BLOCK=8192, ADD=True, KEEP=True,
    ),
    rotary("bf16", "*bf16", 0.0, norm=False),
    rotary("int8, norm, head_dim 80", "*i8", 127.0, norm=True, HEAD_DIM=80),
    rotary("fp8", "*u8", 448.0, norm=False),
    *frames(aligned=True), *frames(aligned=False), *lora(16), *lora(64), *edits(),
]  # fmt: skip


@pytest.fixture(scope="module", params=sorted(SHARED_CEILING))
def compiled(request: pytest.FixtureRequest) -> list[Compiled]:
    results = compile_all([replace(one, arch=request.param) for one in BUILDS])
    print(table(results))  # noqa: T201
    return results


def test_kernels_build_without_spills_and_within_shared_memory(compiled: list[Compiled]) -> None:
    assert [(one.label, one.error) for one in compiled if one.error] == []
    # The sine of angles beyond 105,615 takes an array of 7 words in the math library that Triton 3.6 brings.
    spilled = [one.label for one in compiled if one.stack > (40 if "rotary" in one.label else 0)]
    assert spilled == []
    assert [one.label for one in compiled if one.shared > SHARED_CEILING[one.arch]] == []


def test_lora_multiplies_on_tensor_cores(compiled: list[Compiled]) -> None:
    products = [one for one in compiled if "shrink" in one.label or "expand" in one.label]
    assert len(products) == 4
    assert all(one.instructions["mma.sync"] for one in products)
