"""How often 16 bits or int8, in the compute or on the wire, change the greedy token; and how close the call was.

    python -m benchmarks.agreement MODEL [MODEL ...] [--partition 1,1 --sequences 16 --tokens 192]

The float32 model writes greedy text from random prompts; each variant then reads the same text (teacher forcing)
through A, codec, B, codec, C, and its argmax is compared position by position. The margin is the float32 model's
distance between its best and second-best logit, where the variant chose another token and over all positions.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import record
from split_llama.checkpoint import Checkpoint
from split_llama.config import Partition
from split_llama.engine.engine import Engine
from split_llama.engine.sequence import Sequence
from split_llama.hub import resolve_model
from split_llama.load import load_embedding, load_head, load_segment, parse_dtype
from split_llama.wire.codec import Codec, decode_rows, encode_rows

VARIANTS = (
    ("float32", "bf16"),
    ("float32", "fp16"),
    ("float32", "int8"),
    ("bfloat16", "bf16"),
    ("float16", "fp16"),
    ("bfloat16", "int8"),
)
PROMPT = 8


@dataclass
class Pipeline:
    """A, B and C in one process with the wire's codec between them."""

    checkpoint: Checkpoint
    partition: Partition
    dtype: str
    codec: Codec

    def __post_init__(self) -> None:
        layers = self.checkpoint.config.num_hidden_layers
        placed: dict[str, Any] = {"dtype": parse_dtype(self.dtype), "device": torch.device("cpu")}
        self._embedding = load_embedding(self.checkpoint, **placed)
        self._head = load_head(self.checkpoint, self._embedding, **placed)
        cuts = (self.partition.segment_a, self.partition.segment_b, self.partition.segment_c)
        self._engines = [Engine(load_segment(self.checkpoint, cut(layers), **placed), num_pages=128) for cut in cuts]

    def start(self) -> list[Sequence]:
        """Begin a sequence in every segment."""
        return [engine.sequence(engine.blocks, 2048) for engine in self._engines]

    @torch.inference_mode()
    def logits(self, sequences: list[Sequence], tokens: list[int]) -> Tensor:
        """Logits `[n, V]` of new tokens; a first row crosses the wire exact, as the edge sends it."""
        exact = sequences[0].length == 0
        states = self._embedding(torch.tensor(tokens))
        for place, (engine, sequence) in enumerate(zip(self._engines, sequences, strict=True)):
            if place:
                states = self._cross(states, exact)
            states = engine.run(engine.plan([sequence.append(len(tokens))]), states)
        out: Tensor = self._head(states)
        return out

    def _cross(self, states: Tensor, exact: bool) -> Tensor:
        wide = states.float().numpy()
        out = np.empty_like(wide)
        decode_rows(self.codec, encode_rows(self.codec, wide), out)
        if exact:
            out[0] = wide[0]
        return torch.from_numpy(out).to(states.dtype)

    def read(self, tokens: list[int]) -> Tensor:
        """Logits of a whole text."""
        sequences = self.start()
        logits = self.logits(sequences, tokens)
        for sequence in sequences:
            sequence.free()
        return logits


def greedy_text(model: Pipeline, seed: int, count: int) -> list[int]:
    """Let the model write `count` tokens after a random prompt."""
    generator = torch.Generator().manual_seed(seed)
    vocab = model.checkpoint.config.vocab_size
    text = [1, *torch.randint(3, vocab, (PROMPT - 1,), generator=generator).tolist()]
    sequences = model.start()
    new = text
    for _ in range(count):
        new = [int(model.logits(sequences, new)[-1].argmax())]
        text = text + new
    for sequence in sequences:
        sequence.free()
    return text


def percentiles(values: Tensor) -> dict[str, float] | None:
    """Give p10, p50 and p90; nothing for no values."""
    if not len(values):
        return None
    found = values.quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
    return dict(zip(("p10", "p50", "p90"), found, strict=True))


def compare(model: str, partition: Partition, sequences: int, tokens: int) -> list[dict[str, Any]]:
    """Measure all variants on one model."""
    checkpoint = Checkpoint.open(resolve_model(model))
    exact = Pipeline(checkpoint, partition, "float32", Codec.FP32)
    texts = [greedy_text(exact, seed, tokens) for seed in range(sequences)]
    wanted = torch.cat([exact.read(text)[PROMPT - 1 : -1] for text in texts])
    top = wanted.topk(2).values
    margins = top[:, 0] - top[:, 1]
    rows = []
    for dtype, codec in VARIANTS:
        variant = Pipeline(checkpoint, partition, dtype, Codec.parse(codec))
        got = torch.cat([variant.read(text)[PROMPT - 1 : -1] for text in texts])
        differs = got.argmax(-1) != wanted.argmax(-1)
        rows.append(
            {
                "model": Path(model).name,
                "partition": str(partition),
                "dtype": dtype,
                "codec": codec,
                "positions": len(differs),
                "agreement": 1 - differs.float().mean().item(),
                "margin_where_different": percentiles(margins[differs]),
                "margin_everywhere": percentiles(margins),
            }
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Run and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--partition", type=Partition.parse, default=Partition(1, 1))
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=192)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        row for model in options.models for row in compare(model, options.partition, options.sequences, options.tokens)
    ]
    record("agreement", {"rows": rows})


if __name__ == "__main__":
    main()
