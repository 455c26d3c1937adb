"""What all launches share: where kernels run, and the arithmetic of their sizes."""

from __future__ import annotations

import triton


def interpreting() -> bool:
    """Say whether kernels run in Triton's interpreter, on CPU tensors (`TRITON_INTERPRET=1`)."""
    return bool(triton.knobs.runtime.interpret)


def next_power_of_two(value: int) -> int:
    """Give the smallest power of two that is at least `value`; 1 for anything below."""
    return 1 << max(value - 1, 0).bit_length()
