"""The bundled demo model: a small LLaMA with its tokenizer, as package data (`docs/demo-model.md`)."""

from importlib.resources import files
from pathlib import Path


def demo_model_path() -> Path:
    """The folder of the bundled model, in Hugging Face's layout. The package must be installed unzipped."""
    return Path(str(files(__name__) / "model"))
