"""What fewer bits cost in quality: in the weights, in the KV cache, on the wire.

    python -m benchmarks.quality MODEL [MODEL ...] [--text FILE --partition 1,1 --sequences 16 --tokens 192]

The float32 model writes greedy text from random prompts; each variant then reads the same text (teacher forcing)
through A, codec, B, codec, C, and its argmax is compared position by position. The margin is the float32 model's
distance between its best and second-best logit, where the variant chose another token and over all positions.
Perplexity is that of each variant on text that the float32 model sampled at temperature 1, and on each `--text` file.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence as Several
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import record
from split_llama.checkpoint import Checkpoint
from split_llama.config import Partition
from split_llama.engine.engine import Engine
from split_llama.engine.kv_cache import KV_DTYPES
from split_llama.engine.sequence import Sequence
from split_llama.hub import resolve_model
from split_llama.load import load_embedding, load_packed_head, load_packed_segment, parse_dtype
from split_llama.products import Numerics
from split_llama.wire.codec import Codec, decode_rows, encode_rows


@dataclass(frozen=True)
class Variant:
    """In what both parties compute, what the server's KV cache stores, and how states travel."""

    dtype: str = "float32"
    quantization: str = "none"
    kv: str = "float32"
    codec: str = "fp32"


EXACT = Variant()
VARIANTS = (
    Variant(codec="bf16"),
    Variant(codec="fp16"),
    Variant(codec="int8"),
    Variant(dtype="bfloat16"),
    Variant(dtype="float16"),
    Variant(quantization="int8"),
    Variant(kv="bfloat16"),
    Variant(kv="int8"),
    Variant(kv="fp8"),
    Variant(dtype="bfloat16", codec="fp16"),
    Variant(dtype="float16", codec="fp16"),
    Variant(quantization="int8", codec="fp16"),
    Variant(quantization="int8", kv="int8", codec="int8"),
)
PIECE_TOKENS = 256
PROMPT = 8


class Pipeline:
    """A, B and C in one process with the wire's codec between them."""

    def __init__(self, checkpoint: Checkpoint, partition: Partition, variant: Variant) -> None:
        layers = checkpoint.config.num_hidden_layers
        numerics = Numerics(parse_dtype(variant.dtype), variant.quantization, torch.device("cpu"))
        self.checkpoint = checkpoint
        self._codec = Codec.parse(variant.codec)
        self._embedding = load_embedding(checkpoint, dtype=numerics.compute, device=numerics.device)
        self._head = load_packed_head(checkpoint, numerics)
        cuts = (partition.segment_a, partition.segment_b, partition.segment_c)
        kinds = ("float32", variant.kv, "float32")
        self._engines = [
            Engine(load_packed_segment(checkpoint, cut(layers), numerics), num_pages=128, kv_dtype=KV_DTYPES[kind])
            for cut, kind in zip(cuts, kinds, strict=True)
        ]

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
        decode_rows(self._codec, encode_rows(self._codec, wide), out)
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


def write_text(model: Pipeline, seed: int, count: int, *, greedy: bool) -> list[int]:
    """Let the model write `count` tokens after a random prompt: the likeliest ones, or samples at temperature 1."""
    generator = torch.Generator().manual_seed(seed)
    vocab = model.checkpoint.config.vocab_size
    text = [1, *torch.randint(3, vocab, (PROMPT - 1,), generator=generator).tolist()]
    sequences = model.start()
    new = text
    for _ in range(count):
        logits = model.logits(sequences, new)[-1]
        pick = logits.argmax() if greedy else torch.multinomial(logits.softmax(-1), 1, generator=generator)
        new = [int(pick)]
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


def perplexity(model: Pipeline, pieces: Several[list[int]]) -> float:
    """Exponential of the mean negative log-likelihood of every token after a piece's first."""
    losses = [F.cross_entropy(model.read(piece)[:-1], torch.tensor(piece[1:]), reduction="none") for piece in pieces]
    return float(torch.cat(losses).double().mean().exp())


def cut_text(checkpoint: Checkpoint, file: Path, pieces: int) -> list[list[int]]:
    """Tokenize the beginning of a file and cut it into pieces, each after BOS."""
    from edge_client.tokenizer import EdgeTokenizer

    tokenizer = EdgeTokenizer.open(checkpoint.path)
    ids = tokenizer.encode(file.read_text(encoding="utf-8")[: 16 * pieces * PIECE_TOKENS])
    begin = [ids[0]] if ids[0] == tokenizer.bos_token_id else []
    size = PIECE_TOKENS - len(begin)
    return [begin + ids[size * i : size * (i + 1)] for i in range(pieces) if len(ids) >= size * (i + 1)]


def compare(model: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure all variants on one model."""
    checkpoint = Checkpoint.open(resolve_model(model))
    exact = Pipeline(checkpoint, options.partition, EXACT)
    greedy = [write_text(exact, seed, options.tokens, greedy=True) for seed in range(options.sequences)]
    texts = {"own samples": [write_text(exact, s, options.tokens, greedy=False) for s in range(options.sequences)]}
    texts |= {file.name: cut_text(checkpoint, file, options.sequences) for file in options.text}
    wanted = torch.cat([exact.read(text)[PROMPT - 1 : -1] for text in greedy])
    top = wanted.topk(2).values
    margins = top[:, 0] - top[:, 1]
    rows: list[dict[str, Any]] = []
    for variant in (EXACT, *VARIANTS):
        pipeline = Pipeline(checkpoint, options.partition, variant)
        got = torch.cat([pipeline.read(text)[PROMPT - 1 : -1] for text in greedy])
        differs = got.argmax(-1) != wanted.argmax(-1)
        rows.append(
            {
                "model": Path(model).name,
                "partition": str(options.partition),
                "variant": vars(variant),
                "positions": len(differs),
                "agreement": 1 - differs.float().mean().item(),
                "margin_where_different": percentiles(margins[differs]),
                "margin_everywhere": percentiles(margins),
                "perplexity": {name: perplexity(pipeline, pieces) for name, pieces in texts.items()},
            }
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Run and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--text", nargs="*", type=Path, default=[], metavar="FILE")
    parser.add_argument("--partition", type=Partition.parse, default=Partition(1, 1))
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=192)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for model in options.models for row in compare(model, options)]
    record("quality", {"rows": rows})


if __name__ == "__main__":
    main()
