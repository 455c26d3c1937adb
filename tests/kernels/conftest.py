"""Kernel tests run the real source in Triton's interpreter, on CPU tensors."""

from __future__ import annotations

import os
import sys

import pytest

if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError("triton was imported before tests/kernels could turn its interpreter on: run them apart")

# Before anything imports triton: kernels become interpreted functions when they are decorated.
os.environ["TRITON_INTERPRET"] = "1"
