"""Which drafter a name means: `lookup`, `head`, `auto`, a head's file, or a user's own `module:Class`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from edge_client.plugins import make_plugin
from edge_client.speculation.combined import CombinedDrafter
from edge_client.speculation.drafter import Drafter
from edge_client.speculation.head_drafter import HeadDrafter
from edge_client.speculation.head_file import ends_digest, head_path
from edge_client.speculation.prompt_lookup import PromptLookup
from split_llama.checkpoint import Checkpoint
from split_llama.errors import ModelError, UsageError

NAMES = ("auto", "lookup", "head")
SUFFIX = ".safetensors"
# Heads that come with the program, named by the digest of the model's ends.
BUNDLED = Path(__file__).parent / "heads"


def make_drafter(
    name: str, checkpoint: Checkpoint, states: Path, *, notify: Callable[[str], None] = lambda line: None
) -> Drafter:
    """Make the drafter of this name for the model of `checkpoint` (the edge's part is enough).

    `auto` takes a head where there is one for this model, together with prompt lookup, and prompt lookup alone where
    there is none. `states` is the state folder, where `train-drafter` leaves its heads.

    Raises `UsageError` for an unknown name or a plug-in that cannot be made, `ModelError` for a head that does not fit.
    """
    if name == "lookup":
        return PromptLookup()
    if name == "auto":
        return _auto(checkpoint, states, notify)
    if name == "head":
        path = find_head(checkpoint, states)
        if path is None:
            raise UsageError(
                "there is no draft head for this model; train one with edge-client train-drafter, or use "
                "--drafter lookup"
            )
        return HeadDrafter.open(path, checkpoint)
    if name.endswith(SUFFIX):
        return HeadDrafter.open(Path(name), checkpoint)
    if ":" in name:
        drafter: Drafter = make_plugin("drafter", name, "propose", checkpoint)
        return drafter
    raise UsageError(
        f"the drafter must be one of {', '.join(NAMES)}, a head's file ({SUFFIX}) or module:Class; got {name!r}"
    )


def find_head(checkpoint: Checkpoint, states: Path) -> Path | None:
    """Give the file of the head for this model: the user's own, else one that comes with the program."""
    ends = ends_digest(checkpoint)
    bundled = BUNDLED / head_path(states, ends).name
    return next((path for path in (head_path(states, ends), bundled) if path.is_file()), None)


def _auto(checkpoint: Checkpoint, states: Path, notify: Callable[[str], None]) -> Drafter:
    path = find_head(checkpoint, states)
    if path is None:
        return PromptLookup()
    try:
        return CombinedDrafter(PromptLookup(), HeadDrafter.open(path, checkpoint))
    except ModelError as error:
        notify(f"guessing goes on without the draft head: {error.message}")
        return PromptLookup()
