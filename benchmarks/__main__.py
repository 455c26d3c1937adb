"""Run every benchmark one after the other: `make bench`, or `python -m benchmarks`. Takes about an hour."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def commands() -> list[list[str]]:
    """List the benchmarks with their arguments; a trained model beside the repository takes part if it is there."""
    data = Path(os.environ.get("FL_LLAMA_DATA", "../shared/data"))
    models = ["demo", *([str(data / "stories260K")] if (data / "stories260K").is_dir() else [])]
    texts = [str(file) for file in sorted((data / "text").glob("*.txt"))]
    texts = ["--text", *texts] if texts else []
    return [
        ["split_decode"],
        ["wire_bytes"],
        ["products"],
        ["ablation"],
        ["startup"],
        ["edge_share"],
        ["control_plane"],
        ["quality", *models, *texts],
        ["recover_tokens", *models],
        ["speculation", *models],
        ["links", "--models", *models],
        *([["training_bytes"]] if (data / "multirc").is_dir() else []),
        ["training_memory"],
        ["training_speed"],
        ["training_beside_chat"],
        ["training_quality", "learning", "codecs", *(["noise", "multirc"] if (data / "multirc").is_dir() else [])],
    ]


def main() -> int:
    """Run them all; give the number that failed."""
    failed = 0
    for name, *arguments in commands():
        print(f"\n== {name}", flush=True)
        failed += subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *arguments]).returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main())
