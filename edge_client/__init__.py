"""The edge: it keeps the text, the outer blocks and the head.

`from edge_client import SplitModelForCausalLM` is the way in from Python (`docs/python-api.md`). It is imported when it
is asked for: the commands must start at once, and it brings torch along.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_client.api import SplitModelForCausalLM

__all__ = ["SplitModelForCausalLM"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from edge_client import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
