"""What a draft head is trained on: texts and the model's final states along them, through the split runtime."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from split_llama.errors import ServerFault, UsageError

# Bytes of states that are held at most, as float16: 260,000 positions of a model 4096 wide.
MOST_BYTES = 2 << 30
SAMPLE_TOKENS = 256
SHORTEST = 3


class ScoringEdge(Protocol):
    """What is needed of `EdgeRuntime`."""

    tokenizer: Any
    max_length: int

    async def final_states(self, ids: Sequence[int]) -> Tensor:
        """Final-norm outputs of every position, `[n, d]` float32 on the CPU."""
        ...

    def params(self, *, max_new_tokens: int = 256, **sampling: Any) -> Any:
        """Parameters of an answer."""
        ...

    def generate(self, prompt_ids: Sequence[int], params: Any) -> AsyncIterator[Any]:
        """Make an answer."""
        ...


Collected = list[tuple[list[int], Tensor]]
Notify = Callable[[str], None]


async def final_states(edge: ScoringEdge, ids: Sequence[int]) -> Tensor:
    """Give the final states of every position of `ids`; the server sees the rows of all of them."""
    states = await edge.final_states(ids)
    if states.ndim != 2 or len(states) != len(ids) or not bool(states.isfinite().all()):
        raise ServerFault(
            f"{len(ids)} final states were expected, a tensor of shape {tuple(states.shape)} came, or it is not finite"
        )
    return states


def read_documents(edge: ScoringEdge, files: Sequence[Path]) -> list[list[int]]:
    """Read files whose lines are documents; empty lines are left out, long ones cut. Raises `UsageError`."""
    found = []
    for file in files:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--text {file} cannot be read as UTF-8 text: {error}") from error
        found += [edge.tokenizer.encode(line)[: edge.max_length - 1] for line in lines if line.strip()]
    return found


async def draw_samples(edge: ScoringEdge, count: int, notify: Notify) -> list[list[int]]:
    """Let the model write by itself, at temperature 1."""
    begin = edge.tokenizer.bos_token_id
    if begin is None:
        raise UsageError("this model has no BOS token to begin samples with; give texts instead (--text FILE)")
    samples = []
    for number in range(count):
        params = edge.params(
            max_new_tokens=min(SAMPLE_TOKENS, edge.max_length - 2), temperature=1.0, top_p=1.0, top_k=0
        )
        tokens = [begin]
        async for event in edge.generate([begin], params):
            tokens.append(event.token)
        samples.append(tokens)
        notify(f"sample {number + 1} of {count}")
    return samples


async def collect(edge: ScoringEdge, documents: Sequence[Sequence[int]], notify: Notify) -> Collected:
    """Get the final states of each document, as float16, until their memory is full."""
    found: Collected = []
    held = 0
    for number, ids in enumerate(documents):
        if len(ids) < SHORTEST:
            continue
        states = (await final_states(edge, ids)).to(torch.float16)
        held += states.nbytes
        if held > MOST_BYTES:
            notify(f"the last {len(documents) - number} of {len(documents)} texts are left out: memory is full")
            break
        found.append((list(ids), states))
        notify(f"text {number + 1} of {len(documents)}")
    return found
