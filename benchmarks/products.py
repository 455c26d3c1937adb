"""Rows times large weights on a CPU: what each way of storing them reaches, by shape and number of rows.

    python -m benchmarks.products [--threads 1]

These figures are behind the rules of `split_llama.products`. More weights than any cache holds, so that memory is what
is timed; "read" is how fast the same thread reads them straight through.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import record
from split_llama.load import set_up_cpu
from split_llama.products import DynamicInt8, Half, Packed

# Those of the 134M model, and two of an 8B model.
SHAPES = ((2304, 768), (768, 768), (4096, 768), (768, 2048), (32000, 768), (6144, 4096), (4096, 14336))
ROWS = (1, 2, 4, 8, 16, 64)
WEIGHTS = 5e7

Multiply = Callable[[Tensor], Tensor]


def dense(weight: Tensor, dtype: torch.dtype) -> Multiply:
    """PyTorch's own product, rows and weights in one type."""
    stored = weight.to(dtype)
    return lambda x: F.linear(x.to(dtype), stored)


WAYS: dict[str, tuple[int, Callable[[Tensor], Multiply]]] = {
    "float32 dense": (4, lambda weight: dense(weight, torch.float32)),
    "float32 packed": (4, lambda weight: Packed(weight, None, torch.float32)),
    "bfloat16 dense": (2, lambda weight: dense(weight, torch.bfloat16)),
    "bfloat16 packed": (2, lambda weight: Packed(weight, None, torch.bfloat16)),
    "float16 dense": (2, lambda weight: dense(weight, torch.float16)),
    "float16": (2, lambda weight: Half(weight, None)),
    "int8": (1, lambda weight: DynamicInt8(weight, None)),
}


def seconds(products: Sequence[Multiply], x: Tensor) -> float:
    """Median over passes through all weights."""
    taken = []
    for _ in range(7):
        begin = time.perf_counter()
        for product in products:
            product(x)
        taken.append(time.perf_counter() - begin)
    return sorted(taken)[len(taken) // 2]


def main() -> None:
    """Run and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    set_up_cpu(options.threads)
    figures: list[dict[str, Any]] = []
    with torch.inference_mode():
        for out, width in SHAPES:
            count = max(2, int(WEIGHTS / (out * width)))
            weights = [torch.randn(out, width) for _ in range(count)]
            elements = count * out * width
            for name, (size, make) in WAYS.items():
                products = [make(weight) for weight in weights]
                for rows in ROWS:
                    if name == "float16 dense" and rows > 4:
                        continue  # minutes, to show once more that it is no way
                    rate = elements * size / seconds(products, torch.randn(rows, width)) / 1e9
                    figures.append({"out": out, "in": width, "way": name, "rows": rows, "gb_s": rate})
                shape = (out, width, name)
                done = [f for f in figures if (f["out"], f["in"], f["way"]) == shape]
                print(out, width, name, {f["rows"]: round(f["gb_s"], 1) for f in done}, flush=True)
            read = seconds([lambda x, w=weight: w.sum() for weight in weights], torch.empty(0))  # type: ignore[misc]
            figures.append({"out": out, "in": width, "way": "read", "rows": 0, "gb_s": elements * 4 / read / 1e9})
    record("products", {"threads": options.threads, "rows": figures})


if __name__ == "__main__":
    main()
