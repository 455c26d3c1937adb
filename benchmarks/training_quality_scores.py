"""Held-out scores of trained adapters: the answer word for word, and its loss, behind the noise of training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from edge_client.edge_model import CALIBRATION_TOKENS
from split_llama.checkpoint import Checkpoint
from split_llama.config import BlockRange, Partition
from split_llama.load import load_segment
from split_llama.lora import LoraConfig
from split_llama.noise import SECRET_BYTES, NoiseScope, NoiseSpec, calibrate_clip
from training.client.privacy import StateNoise, adapter_digest
from training.compute.batch import Batch
from training.compute.ends import Ends
from training.compute.lora import Group
from training.compute.tape import Trunk, finish
from training.job_config import JobConfig
from training.tasks.examples import Sample

SECRET = bytes(range(SECRET_BYTES))
ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Parts:
    """A, B, C and head of a model in one process, with a job's adapters on them."""

    ends: Ends
    b: Trunk
    lora: LoraConfig

    @classmethod
    def load(cls, checkpoint: Checkpoint, config: JobConfig) -> Parts:
        """Load all of it, float32."""
        cut, lora = Partition.parse(config.partition), config.lora.config
        segments = config.lora.segments
        middle = cut.segment_b(checkpoint.config.num_hidden_layers)
        trunk = Trunk(
            load_segment(checkpoint, middle, dtype=torch.float32, device=torch.device("cpu")),
            lora if "B" in segments else None,
        )
        return cls(Ends.load(checkpoint, cut, lora, segments), trunk, lora)

    @property
    def block_range(self) -> BlockRange:
        """The blocks of A."""
        return self.ends.a.segment.blocks

    def noise(self, text: str, bos: int | None, weights: Mapping[str, Tensor]) -> StateNoise:
        """Make the noise of `--noise TEXT`, its clip norm calibrated on A with `weights` as the edge does it."""
        spec = NoiseSpec.parse(text)
        if spec.sigma:
            spec = replace(spec, clip=calibrate_clip(self._norms(bos, weights)))
        scope = NoiseScope("benchmark", "", self.block_range, self.ends.a.segment.config.hidden_size, spec, "float32")
        return StateNoise(spec, scope, SECRET, bos)

    def _norms(self, bos: int | None, weights: Mapping[str, Tensor]) -> list[float]:
        vocabulary = self.ends.a.segment.config.vocab_size
        begin = [] if bos is None else [bos]
        tokens = [(2 * i + 1) * vocabulary // (2 * CALIBRATION_TOKENS) for i in range(CALIBRATION_TOKENS)]
        texts = [[*begin, token] for token in tokens]
        states = self.ends.forward_a(Batch.of(texts, texts), weights, None)[0]
        norms: list[float] = states.norm(dim=-1).view(len(tokens), -1)[:, len(begin)].tolist()
        return norms


@dataclass(frozen=True)
class Score:
    """Share of samples whose whole answer, end token included, is the model's greedy one; mean loss of its tokens.

    A greedy answer equals the right one if and only if every token of the right one is the best behind those before it,
    so nothing has to be generated; and noise is a function of the prefix, which is then the same.
    """

    accuracy: float
    loss: float


def score(parts: Parts, weights: Mapping[str, Tensor], noise: StateNoise, samples: Sequence[Sample]) -> Score:
    """Score adapters `weights` (of A, B and C) on samples."""
    own = {name: tensor for name, tensor in weights.items() if name in _names(parts, weights)}
    adapter = adapter_digest(parts.lora, own)
    right, loss, targets = 0, 0.0, 0
    for some in _cut(samples):
        batch = Batch.of([one.token_ids for one in some], [one.labels for one in some])
        states = noise.release(parts.ends.forward_a(batch, weights, None)[0], batch, adapter).rows.detach()
        group = Group(batch.ragged.lengths, weights)
        middle = finish(parts.b.forward(states, [group], keep=False)).output
        out = finish(parts.ends.c.forward(middle, [group], keep=False)).output
        rows, wanted = batch.targets()
        with torch.inference_mode():
            logits = parts.ends.head(out[rows]).float()
            loss += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
            hits = logits.argmax(-1) == wanted
        owner = torch.repeat_interleave(torch.arange(len(some)), torch.tensor(batch.ragged.lengths))[rows]
        wrong = set(owner[~hits].tolist())
        right, targets = right + len(some) - len(wrong), targets + len(rows)
    return Score(right / len(samples), loss / targets)


def _names(parts: Parts, weights: Mapping[str, Tensor]) -> set[str]:
    blocks = parts.block_range
    return {name for name in weights if int(name.split(".")[2]) in range(blocks.start, blocks.stop)}


def _cut(samples: Sequence[Sample]) -> Iterator[list[Sample]]:
    """Cut samples into batches of alike lengths."""
    batch: list[Sample] = []
    rows = 0
    for sample in sorted(samples, key=lambda sample: len(sample.token_ids)):
        if batch and rows + len(sample.token_ids) > ROWS_AT_ONCE:
            yield batch
            batch, rows = [], 0
        batch.append(sample)
        rows += len(sample.token_ids)
    yield batch
