"""Tests that need a CUDA device. Run them apart from tests/kernels, whose interpreter would be on: `pytest tests/gpu`.

Test modules import kernels inside their tests and fixtures, after `device`, so that collecting them imports no triton.
"""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    """A CUDA device on which kernels are compiled; skips the test where there is none."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("kernels are interpreted in this process: run tests/gpu by itself")
    return torch.device("cuda", 0)
