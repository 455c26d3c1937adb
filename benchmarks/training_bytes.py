"""Bytes per sample on the wire in split fine-tuning, and what the paper's implementation sends. Counted, not modelled.

    python -m benchmarks.training_bytes [--data FILE --task multirc --tokenizer DIR] [--samples 1024]

Samples of MultiRC (`../shared/data`, the tokenizer of LLaMA-2) go through micro-batches in the order of training. Ours:
each message of a micro-batch, and its share of STEP and REPLY, is built and cut into frames as client and server do,
with what the WebSocket adds (its own library's framing). The paper's released code (arXiv 2505.15683) sends states and
gradients as dense fp16 of `[batch, longest, width]`, padded to the batch's longest sample, four times: h_A, h_B and
their gradients. Whatever it adds around them is left out, in its favour. On the first step it also sends the whole
fp16 mask of 4096 x 4096 once.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from websockets.frames import Frame as WebSocketFrame
from websockets.frames import Opcode

from benchmarks.common import record
from split_llama.wire.codec import Codec, row_bytes
from split_llama.wire.frame import Kind, encode_message, frame_limit
from split_llama.wire.training import Answer, Backward, Commit, Forward, Message, Outcome, cut
from training.tasks.encoding import Encoder
from training.tasks.examples import Sample
from training.tasks.order import Order
from training.tasks.readers import read_task

WIDTH = 4096
MASK_BYTES = 2 * 4096 * 4096
BATCHES = (1, 4, 8)
CODECS = (
    (Codec.FP32, Codec.FP32),
    (Codec.FP16, Codec.BF16),
    (Codec.INT8, Codec.BF16),
    (Codec.INT8, Codec.INT8),
)
STEP = 12345
FRAMES_PER_MESSAGE = 4


def on_the_wire(message: Message, mask: bool) -> int:
    """Bytes of a message in WebSocket messages of up to 256 KiB, as client and server send them."""
    frames = list(cut(message, handle=1, width=WIDTH, max_frame_bytes=frame_limit(WIDTH)))
    total = 0
    for start in range(0, len(frames), FRAMES_PER_MESSAGE):
        data = encode_message(frames[start : start + FRAMES_PER_MESSAGE])
        total += len(WebSocketFrame(Opcode.BINARY, data).serialize(mask=mask))
    return total


def step_bytes(lengths: Sequence[int], targets: int, codecs: tuple[Codec, Codec]) -> tuple[int, int]:
    """Bytes up and down of an optimizer step of one micro-batch, private A and C."""
    states, gradients = codecs
    rows = sum(lengths)
    place = {"generation": 1, "step": STEP, "micro": 0}
    forward = Forward(of=1, targets=targets, lengths=tuple(lengths), **place).to_bytes()
    commit = Commit(generation=1, step=STEP, samples=len(lengths), targets=targets, loss=1.2345678901234567)
    outcome = Outcome(
        generation=1,
        step=STEP,
        included=True,
        loss=1.2345678901234567,
        learning_rate=1.2345678901234567e-5,
        gradient_norm=1.2345678901234567,
    )

    def message(kind: Kind, header: bytes, codec: Codec = Codec.FP32, count: int = 0) -> Message:
        return Message(kind, 4 * STEP, header, codec, count, bytes(count * row_bytes(codec, WIDTH)))

    up = (
        message(Kind.FORWARD, forward, states, rows),
        message(Kind.BACKWARD, Backward(**place).to_bytes(), gradients, rows),
        message(Kind.STEP, commit.to_bytes()),
    )
    down = (
        message(Kind.FORWARD, Answer(**place).to_bytes(), states, rows),
        message(Kind.BACKWARD, Answer(**place).to_bytes(), gradients, rows),
        message(Kind.REPLY, outcome.to_bytes()),
    )
    return sum(on_the_wire(one, True) for one in up), sum(on_the_wire(one, False) for one in down)


def paper_bytes(lengths: Sequence[int]) -> int:
    """Bytes of one step of the paper's code: four dense fp16 tensors."""
    return 4 * len(lengths) * max(lengths) * WIDTH * 2


def count(samples: Sequence[Sample], batch: int, codecs: tuple[Codec, Codec], wanted: int) -> dict[str, float | str]:
    """Count `wanted` samples in batches; everything per sample."""
    order = Order(samples, batch, seed=0)
    up = down = paper = rows = 0
    for index in range(wanted // batch):
        some = order.batch(index)
        lengths = [len(sample.token_ids) for sample in some]
        more_up, more_down = step_bytes(lengths, sum(sample.targets for sample in some), codecs)
        up, down = up + more_up, down + more_down
        paper += paper_bytes(lengths)
        rows += sum(lengths)
    ours = up + down
    return {
        "batch": batch,
        "states": codecs[0].label,
        "gradients": codecs[1].label,
        "tokens": rows / wanted,
        "up": up / wanted,
        "down": down / wanted,
        "ours": ours / wanted,
        "paper": paper / wanted,
        "paper_with_mask": (paper + MASK_BYTES) / wanted,
        "ours_over_paper": ours / paper,
        "beyond_values": ours / (2 * rows * (row_bytes(codecs[0], WIDTH) + row_bytes(codecs[1], WIDTH))) - 1,
    }


def main() -> None:
    """Count and record."""
    data = Path(os.environ.get("FL_LLAMA_DATA", "../shared/data"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=data / "multirc" / "train.jsonl")
    parser.add_argument("--task", default="multirc")
    parser.add_argument("--tokenizer", type=Path, default=data / "llama2-tokenizer", help="a model folder's tokenizer")
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--max-length", type=int, default=1024)
    options = parser.parse_args()
    encoded = Encoder.open(options.tokenizer, options.max_length).encode(read_task(options.task, options.data))
    rows = []
    for batch in BATCHES:
        for codecs in CODECS:
            rows.append(count(encoded.samples, batch, codecs, options.samples))
            print({key: round(value, 3) if isinstance(value, float) else value for key, value in rows[-1].items()})
    figures = {"width": WIDTH, "mask_bytes": MASK_BYTES, "task": options.task, "samples": options.samples}
    record("training_bytes", figures | {"shortened": encoded.shortened, "left_out": encoded.left_out, "rows": rows})


if __name__ == "__main__":
    main()
