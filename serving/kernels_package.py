"""Whether `import kernels` gives our Triton kernels.

A package of Hugging Face has the same name. Installed beside ours it overwrites files of ours, or hides them, and
transformers would take ours for it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

from split_llama.errors import UsageError

OURS = Path(__file__).resolve().parents[1] / "kernels"
REMEDY = (
    "to use the Triton kernels: pip uninstall kernels, then pip install --force-reinstall --no-deps fl-llama; or do "
    "without them: --attention torch"
)


def check_kernels_package() -> None:
    """Raise `UsageError`, naming what is in the way and what to do, unless `import kernels` gives our package."""
    try:
        version = importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        pass
    else:
        raise UsageError(
            f"Hugging Face's package kernels {version} is installed beside fl-llama, whose Triton kernels have the "
            f"same name; {REMEDY}"
        )
    spec = importlib.util.find_spec("kernels")
    if spec is None:
        raise UsageError(f"the package kernels, which is part of fl-llama, is missing; {REMEDY}")
    found = [Path(folder).resolve() for folder in spec.submodule_search_locations or ()]
    if OURS not in found:
        raise UsageError(
            f"expected the package kernels in {OURS}; Python finds another of that name in "
            f"{', '.join(map(str, found)) or spec.origin}; rename or remove that one, or, {REMEDY}"
        )
