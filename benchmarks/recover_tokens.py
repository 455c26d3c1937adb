"""What the server can read: tokens recovered from the noised states by two attacks that need only public weights.

    python -m benchmarks.recover_tokens MODEL [MODEL ...] [--tokens 24]

- nearest embedding: each state is matched to the closest row of the token embedding;
- vocabulary matching ("Hidden No More", arXiv 2505.18332): position by position, every token of the vocabulary is run
  through A behind the prefix recovered so far, and the one whose state lies nearest is taken.

Controls: clean states (noise 0) must be recovered, states shuffled over positions must not. Clipping is off: it can
only bind on rows whose norm is unusual.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from benchmarks.common import record
from split_llama.hub import resolve_model

MEAN_ABS = (0.0, 0.02, 0.1, 0.2, 0.4, 1.0)
TEXTS = (
    "Emma and Ben are in the garden. Emma takes the red ball and walks to the kitchen with it.",
    "Once upon a time there was a little girl who wanted to go to the park with her dog.",
    "Tom leaves the book in the library. Then he goes to the office. Where is the book?",
    "The doctor said that the tests were fine, and that she could go home on Monday.",
)


class Attacker:
    """Holds the public embedding and the first `p` blocks."""

    def __init__(self, folder: Path, p: int) -> None:
        from transformers import AutoModel

        model = AutoModel.from_pretrained(folder, dtype=torch.float32)
        model.layers = model.layers[:p]
        model.norm = torch.nn.Identity()
        self._model = model
        self.vocab = model.config.vocab_size

    @torch.inference_mode()
    def states(self, texts: Tensor) -> Tensor:
        """A's output `[batch, length, hidden]` for token ids `[batch, length]`."""
        out: Tensor = self._model(texts).last_hidden_state
        return out

    @torch.inference_mode()
    def nearest_embedding(self, seen: Tensor) -> list[int]:
        """Match each state to the closest embedding row."""
        return torch.cdist(seen, self._model.embed_tokens.weight).argmin(-1).tolist()

    @torch.inference_mode()
    def match_vocabulary(self, seen: Tensor, bos: int) -> list[int]:
        """Recover the tokens one by one; the first is BOS and known."""
        found = [bos]
        candidates = torch.arange(self.vocab)[:, None]
        prefix = torch.tensor([found])
        for position in range(1, len(seen)):
            texts = torch.cat((prefix.expand(self.vocab, -1), candidates), dim=1)
            guesses = self._model(texts).last_hidden_state[:, -1]
            best = int((guesses - seen[position]).norm(dim=-1).argmin())
            prefix = torch.cat((prefix, torch.tensor([[best]])), dim=1)
        return prefix[0].tolist()


def recovered(found: list[int], text: list[int]) -> float:
    """Share of tokens recovered, BOS left out."""
    return sum(a == b for a, b in zip(found[1:], text[1:], strict=True)) / (len(text) - 1)


def attack(model: str, texts: list[list[int]], p: int) -> list[dict[str, Any]]:
    """Attack all texts at every noise level, and the shuffled control."""
    attacker = Attacker(resolve_model(model), p)
    clean = [attacker.states(torch.tensor([text]))[0] for text in texts]
    scale = float(torch.cat([rows[1:] for rows in clean]).abs().mean())
    generator = torch.Generator().manual_seed(0)
    rows = []
    for mean_abs in (*MEAN_ABS, None):
        matched, nearest = [], []
        for text, states in zip(texts, clean, strict=True):
            if mean_abs is None:
                order = torch.randperm(len(text) - 1, generator=generator) + 1
                seen = torch.cat((states[:1], states[order]))
            else:
                sigma = mean_abs * math.sqrt(math.pi / 2)
                seen = states + sigma * torch.randn(states.shape, generator=generator)
            matched.append(recovered(attacker.match_vocabulary(seen, text[0]), text))
            nearest.append(recovered(attacker.nearest_embedding(seen), text))
        rows.append(
            {
                "model": Path(model).name,
                "p": p,
                "noise_mean_abs": "shuffled control" if mean_abs is None else mean_abs,
                "state_mean_abs": scale,
                "vocabulary_matching": sum(matched) / len(matched),
                "nearest_embedding": sum(nearest) / len(nearest),
            }
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Run and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--tokens", type=int, default=24)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for model in options.models:
        tokenizer = Tokenizer.from_file(str(resolve_model(model) / "tokenizer.json"))
        texts = [tokenizer.encode(text).ids[: options.tokens] for text in TEXTS]
        for p in (1, 2, 3):
            rows += attack(model, texts, p)
    record("recover_tokens", {"rows": rows})


if __name__ == "__main__":
    main()
