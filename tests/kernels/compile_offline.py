"""Compiles kernels for GPUs that are not here, and reads back what the compiler made of them.

The tests' own process has the interpreter on, so the compiler runs in a child without it: `compile_all` sends the
builds to this file as a script, JSON in and JSON out. Triton's cache makes a second run quick.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# Shared memory that one block may have, by architecture (CUDA C++ Programming Guide, "Technical Specifications").
SHARED_CEILING = {80: 163 * 1024, 90: 227 * 1024}


@dataclass(frozen=True)
class Build:
    """One kernel to compile.

    `kernel` is "package.module:function". `signature` names the type of every run-time argument ("*bf16", "i32",
    "fp32", ...) and `constexprs` the value of every compile-time one (`None` for a pointer that is not passed).
    Pointers, and the integers in `divisible`, are promised to be multiples of 16, as torch's allocations are.
    """

    kernel: str
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    arch: int = 90
    num_warps: int = 4
    num_stages: int = 3
    divisible: tuple[str, ...] = ()
    label: str = ""


@dataclass(frozen=True)
class Compiled:
    """What became of a build; `error` is empty where it compiled.

    `registers` are per thread, `stack` is bytes per thread (anything above 0 is a spill), `shared` bytes per block.
    `buffers` are the shapes and types of the multi-buffered tiles in shared memory, copies first: "2x64x128xbf16".
    `instructions` counts PTX instructions of interest.
    """

    label: str
    arch: int
    num_warps: int
    num_stages: int
    registers: int = 0
    stack: int = 0
    shared: int = 0
    buffers: tuple[str, ...] = ()
    instructions: Mapping[str, int] = field(default_factory=dict)
    error: str = ""

    def depths(self, *tile: int) -> list[int]:
        """Give the number of copies of each buffer with this tile shape."""
        parts = [buffer.split("x") for buffer in self.buffers]
        return [int(copies) for copies, *shape, _ in parts if shape == [str(size) for size in tile]]


def compile_all(builds: Sequence[Build], timeout: float = 600) -> list[Compiled]:
    """Compile the builds in a child process without the interpreter; results in the same order."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps([dataclasses.asdict(build) for build in builds]),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=timeout,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the compiling process failed:\n{done.stderr[-4000:]}")
    rows = json.loads(done.stdout.splitlines()[-1])
    return [Compiled(**{**row, "buffers": tuple(row["buffers"])}) for row in rows]


def table(results: Sequence[Compiled]) -> str:
    """Lay the results out for people."""
    header = f"{'kernel':52} {'arch':>5} {'warps':>5} {'stages':>6} {'regs':>4} {'stack':>5} {'shared':>7}  buffers"
    lines = [header]
    for one in results:
        lines.append(
            f"{one.label:52} sm_{one.arch} {one.num_warps:5} {one.num_stages:6} {one.registers:4} {one.stack:5}"
            f" {one.shared:7}  {one.error.splitlines()[-1] if one.error else ' '.join(one.buffers)}"
        )
    return "\n".join(lines)


def _compile(row: dict[str, Any]) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    build = Build(**row)
    seen = Compiled(build.label or build.kernel.rpartition(":")[2], build.arch, build.num_warps, build.num_stages)
    module, _, name = build.kernel.partition(":")
    kernel = getattr(importlib.import_module(module), name)
    signature = {arg: build.signature.get(arg, "constexpr") for arg in kernel.arg_names}
    aligned = [arg for arg, kind in signature.items() if kind.startswith("*") or arg in build.divisible]
    attrs = {(kernel.arg_names.index(arg),): [["tt.divisibility", 16]] for arg in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=dict(build.constexprs), attrs=attrs)
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages, "enable_fp_fusion": True}
    try:
        made = triton.compile(source, target=GPUTarget("cuda", build.arch, 32), options=options)
    except Exception as error:
        # Whatever the compiler throws is the finding: the parent's test fails with it.
        return dataclasses.replace(seen, error=f"{type(error).__name__}: {error}")
    usage = _resource_usage(made.asm["cubin"])
    return dataclasses.replace(
        seen,
        registers=usage["REG"],
        stack=usage["STACK"] + usage["LOCAL"],
        shared=made.metadata.shared,
        buffers=_buffers(made.asm["ttgir"]),
        instructions={word: made.asm["ptx"].count(word) for word in ("cp.async.c", "wgmma.mma_async", "mma.sync")},
    )


def _buffers(ttgir: str) -> tuple[str, ...]:
    """Find the mutable tiles in shared memory that the pipeliner allocated (no initial value)."""
    kinds = re.findall(r"ttg\.local_alloc\s*(?:\{[^}]*\})?\s*:\s*\(\)\s*->\s*!ttg\.memdesc<([0-9a-zA-Z]+)", ttgir)
    return tuple(kind for kind in kinds if not kind.endswith("i64"))


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """Ask cuobjdump, which Triton ships, for registers, stack and local memory."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}


if __name__ == "__main__":
    print(json.dumps([dataclasses.asdict(_compile(row)) for row in json.load(sys.stdin)]))  # noqa: T201
