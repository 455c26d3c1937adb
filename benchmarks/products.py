"""Few rows times large weights on a CPU: rows first as in `F.linear`, or weights first (`split_llama.layers.project`).

    python -m benchmarks.products [--threads 1]

Float32 weights of the 134M model's shapes, more of them than any cache holds, so that memory is what is timed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import record
from split_llama.layers import project

SHAPES = ((2304, 768), (768, 768), (4096, 768), (768, 2048), (32000, 768))
STREAMED_BYTES = 200e6


def gigabytes_per_second(product: Callable[[Tensor, Tensor], Tensor], rows: int, weights: list[Tensor]) -> float:
    """Median over passes through all weights."""
    x = torch.randn(rows, weights[0].shape[1])
    seconds = []
    for _ in range(9):
        begin = time.perf_counter()
        for weight in weights:
            product(x, weight)
        seconds.append(time.perf_counter() - begin)
    return sum(weight.nbytes for weight in weights) / sorted(seconds)[len(seconds) // 2] / 1e9


@torch.inference_mode()
def main() -> None:
    """Run and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    figures = []
    for shape in SHAPES:
        weights = [torch.randn(shape) for _ in range(max(2, int(STREAMED_BYTES / (4 * shape[0] * shape[1]))))]
        for rows in (1, 2, 4, 8):
            linear, ours = (gigabytes_per_second(product, rows, weights) for product in (F.linear, project))
            figures.append({"out": shape[0], "in": shape[1], "rows": rows, "linear_gb_s": linear, "project_gb_s": ours})
            print({name: round(value, 1) for name, value in figures[-1].items()}, flush=True)
    record("products", {"threads": options.threads, "rows": figures})


if __name__ == "__main__":
    main()
