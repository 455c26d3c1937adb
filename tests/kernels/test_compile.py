"""The attention kernels as compiled for GPUs: they build, spill nothing, pipeline K and V, and fit in shared memory."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from kernels.kv_pages import QUANTISED_MAX
from kernels.paged_attention.launch import COMBINE_SLOTS, HEAVY_LAUNCHES, LAUNCHES, OTHER_LAUNCH, tiles_for
from kernels.paged_attention.planner import Tiles
from kernels.runtime import next_power_of_two
from tests.kernels.compile_offline import SHARED_CEILING, Build, Compiled, compile_all, table

NAMES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int8: "i8",
    torch.float8_e4m3fn: "fp8e4nv",
}
POINTERS = {
    "partial_ptr": "*fp32",
    "lse_ptr": "*fp32",
    "items_ptr": "*i32",
    "sequences_ptr": "*i32",
    "tables_ptr": "*i32",
    "row_slots_ptr": "*i32",
    "ancestors_ptr": "*i64",
}


def geometry(group: int, head_dim: int, tiles: Tiles) -> dict[str, int]:
    return {
        "GROUP": group,
        "KV_HEADS": 8,
        "HEAD_DIM": head_dim,
        "PADDED_DIM": max(next_power_of_two(head_dim), 16),
        "TILE_M": tiles.rows,
    }


def attend_build(
    arch: int,
    rows: int,
    *,
    group: int = 4,
    head_dim: int = 128,
    page_size: int = 16,
    window: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    kv_dtype: torch.dtype | None = None,
) -> Build:
    """The attention kernel as it would be launched for a query of so many rows."""
    kv_dtype = kv_dtype or dtype
    tiles = tiles_for(rows, group=group, head_dim=head_dim, dtype=dtype, kv_dtype=kv_dtype)
    quantised = kv_dtype in QUANTISED_MAX
    table_used = HEAVY_LAUNCHES if quantised or head_dim > 128 else LAUNCHES
    num_warps, num_stages = table_used.get(tiles, OTHER_LAUNCH)
    pages = "u8" if kv_dtype == torch.float8_e4m3fn and arch < 89 else NAMES[kv_dtype]
    signature = {"q_ptr": NAMES[dtype], "k_ptr": pages, "v_ptr": pages, "out_ptr": NAMES[dtype]}
    scales = {"k_scale_ptr": "fp32", "v_scale_ptr": "fp32"}
    signature = {name: f"*{kind}" for name, kind in (signature | (scales if quantised else {})).items()}
    return Build(
        kernel="kernels.paged_attention.kernel:attend",
        signature={**signature, **POINTERS, "max_pages": "i32", "scale": "fp32"},
        constexprs={
            **({} if quantised else dict.fromkeys(scales)),
            **geometry(group, head_dim, tiles),
            "WINDOW": window,
            "PAGE_SIZE": page_size,
            "TILE_T": tiles.keys,
            "UPCAST": False,
        },
        arch=arch,
        num_warps=num_warps,
        num_stages=num_stages,
        label=f"attend {NAMES[dtype]}/{pages} d{head_dim} x{group} page {page_size} w{window} {tuple_of(tiles)}",
    )


def tuple_of(tiles: Tiles) -> tuple[int, int]:
    return tiles.rows, tiles.keys


def combine_build(arch: int, head_dim: int) -> Build:
    return Build(
        kernel="kernels.paged_attention.kernel:combine",
        signature={"out_ptr": "*bf16", "partial_ptr": "*fp32", "lse_ptr": "*fp32", "combines_ptr": "*i32"},
        constexprs={**geometry(4, head_dim, Tiles(16, 64)), "SLOTS": COMBINE_SLOTS},
        arch=arch,
        label=f"combine d{head_dim}",
    )


def check(builds: list[Build]) -> None:
    results = compile_all(builds)
    print(table(results))  # noqa: T201
    for build, made in zip(builds, results, strict=True):
        assert not made.error, f"{made.label}: {made.error}"
        # Float32 heads of 256 do not fit into registers; they serve comparisons, not speed.
        too_wide = build.signature.get("q_ptr") == "*fp32" and build.constexprs["PADDED_DIM"] == 256
        assert made.stack == 0 or too_wide, f"{made.label} spills"
        assert made.shared <= SHARED_CEILING[made.arch], f"{made.label}: too much shared memory"
        if build.kernel.endswith(":attend"):
            check_pipeline(build, made)


def check_pipeline(build: Build, made: Compiled) -> None:
    """K and V are fetched ahead, and 16-bit products of 64 rows and more run on Hopper's warpgroups."""
    tile = (build.constexprs["TILE_T"], build.constexprs["PADDED_DIM"])
    narrow = build.signature["k_ptr"] in ("*fp16", "*bf16")
    warpgroups = made.arch == 90 and build.constexprs["TILE_M"] >= 64 and build.signature["q_ptr"] != "*fp32"
    assert bool(made.instructions["wgmma.mma_async"]) == warpgroups, made.label
    # Warpgroups read K and V in place, and hold one copy more.
    copies = made.num_stages if warpgroups and narrow else made.num_stages - 1
    assert made.depths(*tile) == [copies, copies], f"{made.label}: {made.buffers}"
    assert made.instructions["cp.async.c"], made.label


FEW, TREE_ROWS, MANY = 1, 9, 512


def test_attention_compiles() -> None:
    check(
        [
            *(attend_build(arch, rows) for arch, rows in product((80, 90), (FEW, TREE_ROWS, MANY))),
            *(attend_build(90, rows, kv_dtype=torch.int8) for rows in (FEW, MANY)),
            attend_build(90, FEW, kv_dtype=torch.float8_e4m3fn),
            attend_build(80, FEW, kv_dtype=torch.float8_e4m3fn),
            attend_build(90, FEW, group=1, head_dim=80, page_size=64, window=1024),
            *(combine_build(arch, 128) for arch in (80, 90)),
        ]
    )


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    ("head_dim", "kv_dtype"),
    [
        # Eight bytes a head are too few to be fetched ahead.
        *((head_dim, None) for head_dim in (8, 64, 80, 128, 256)),
        *product((64, 80, 128, 256), (torch.int8, torch.float8_e4m3fn)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_attention_compiles_in_full(arch: int, head_dim: int, kv_dtype: torch.dtype | None, dtype: torch.dtype) -> None:
    check(
        [
            attend_build(arch, rows, group=group, head_dim=head_dim, dtype=dtype, kv_dtype=kv_dtype, window=window)
            for rows in (FEW, TREE_ROWS, MANY)
            for group, window in ((1, 0), (8, 4096))
        ]
        + [combine_build(arch, head_dim)]
    )
