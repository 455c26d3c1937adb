"""K and V pages of one block as the kernels read and write them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# The largest value of each quantised storage type; a (slot, head)'s scale is its largest magnitude over this.
QUANTISED_MAX = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
STORAGE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, *QUANTISED_MAX)


@dataclass(frozen=True, slots=True)
class KVPages:
    """One block's pages: `k`, `v` `[pages, page_size, G, K]`; their scales `[pages, page_size, G]` float32, or `None`.

    Storage is float32, float16 or bfloat16 without scales, or int8 or float8_e4m3fn with them: a stored value times
    the scale of its slot and head is the value meant. All tensors are contiguous, so that a kernel needs no strides.
    Raises ValueError otherwise.
    """

    k: Tensor
    v: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    def __post_init__(self) -> None:
        if self.k.shape != self.v.shape or self.k.dim() != 4 or self.k.dtype != self.v.dtype:
            raise ValueError(f"k and v must be alike, 4-dimensional; got {_describe(self.k)} and {_describe(self.v)}")
        if self.k.dtype not in STORAGE_DTYPES:
            raise ValueError(f"the storage type must be one of {STORAGE_DTYPES}, not {self.k.dtype}")
        for scale in (self.k_scale, self.v_scale):
            if (scale is not None) != self.quantised:
                raise ValueError(f"{self.k.dtype} pages {'need both' if self.quantised else 'take no'} scales")
            if scale is not None and (scale.shape != self.k.shape[:3] or scale.dtype != torch.float32):
                raise ValueError(f"scales must be float32 {tuple(self.k.shape[:3])}, not {_describe(scale)}")
        if not all(part is None or part.is_contiguous() for part in (self.k, self.v, self.k_scale, self.v_scale)):
            raise ValueError("pages and scales must be contiguous")

    @property
    def quantised(self) -> bool:
        """Whether the pages hold int8 or fp8 with scales."""
        return self.k.dtype in QUANTISED_MAX

    @property
    def page_size(self) -> int:
        """Slots per page."""
        return self.k.shape[1]

    @property
    def kv_heads(self) -> int:
        """Key-value heads, G."""
        return self.k.shape[2]

    @property
    def head_dim(self) -> int:
        """Width of a head, K."""
        return self.k.shape[3]


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"


def quantise(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Quantise heads `[..., K]` to int8 or float8_e4m3fn: what is stored, and scales `[...]` float32.

    The scale is the head's largest magnitude over the type's largest value; a head of zeros has scale 0 and stores 0.
    """
    wide, largest = values.float(), QUANTISED_MAX[dtype]
    scale = wide.abs().amax(-1) / largest
    # The smallest numbers over their rounded scale may pass the largest value.
    steps = (wide / torch.where(scale == 0, 1.0, scale)[..., None]).clamp(-largest, largest)
    return (steps.round() if dtype == torch.int8 else steps).to(dtype), scale


def dequantise(stored: Tensor, scale: Tensor | None) -> Tensor:
    """Give the values that are meant, float32: stored `[..., K]` times scales `[...]` where there are any."""
    return stored.float() if scale is None else stored.float() * scale[..., None]
