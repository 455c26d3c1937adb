"""How an answer is made where its request says nothing: as the edge was started, else as the checkpoint says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edge_client.runtime import EdgeRuntime
from edge_client.settings import EdgeSettings
from edge_client.turn import GenerationParams

# Fields of `EdgeSettings` and arguments of `EdgeRuntime.params` alike.
NAMES = ("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")


def usual_params(
    edge: EdgeRuntime, settings: EdgeSettings, *, stop: Sequence[str] = (), **given: Any
) -> GenerationParams:
    """Fill in what a request leaves open (or None); its `stop` strings come beside those of the settings.

    `given` takes what `EdgeRuntime.params` takes. Raises `UsageError`.
    """
    wanted = {name: getattr(settings, name) for name in NAMES}
    wanted |= {name: value for name, value in given.items() if value is not None}
    return edge.params(stop=(*settings.stop, *stop), **wanted)
