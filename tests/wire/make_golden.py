"""The committed byte vectors: what every later version, and a client in another language, must produce and understand.

`python tests/wire/make_golden.py` writes `golden/*.json` anew. Do that only when the protocol version changes: a
difference means that old clients do not understand the new server.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from split_llama.errors import OutOfPages
from split_llama.wire.codec import Codec, Floats, decode_rows, encode_rows
from split_llama.wire.control import Fork, Grant, Hello, HelloReply, Moved, Open, error_frame
from split_llama.wire.frame import HEADER_SIZE, MAX_FRAME_BYTES, Flag, Frame, Kind
from split_llama.wire.step import build_step
from split_llama.wire.training import Backward, Commit, Forward, Join, Message, cut

FOLDER = Path(__file__).parent / "golden"
SESSION, SECRET, DIGEST = "5e" * 16, "ab" * 32, "cd" * 32
ROW = np.array([[0.5, -1.0, 0.25, 100.0]], np.float32)
ANSWER = np.array([[1.5, 2.0, -0.125, 0.0]], np.float32)


def frames() -> dict[str, Frame]:
    """One frame or more of each kind, by name."""
    two = encode_rows(Codec.FP16, np.vstack((ROW, ANSWER)))
    one = encode_rows(Codec.FP16, ROW)
    opening = Open(session=SESSION, secret=SECRET, blocks=(1, 3), geometry=DIGEST)
    grant = Grant(window_steps=16, window_bytes=1 << 20, length=0, seq=0, grace_seconds=120)
    fork = Fork(parent=1, at=1, session="6f" * 16, secret="ef" * 32)
    hello_reply = HelloReply(
        protocol=1,
        server="fl-llama",
        model="demo",
        blocks=(1, 3),
        hidden_size=4,
        geometry=DIGEST,
        codecs=("fp32", "bf16", "fp16", "int8"),
        max_frame_bytes=65536,
        max_message_bytes=1 << 20,
        max_step_rows=512,
        max_model_len=2048,
    )
    refusal = OutOfPages("no KV pages are free; send the same step again later", retry_after_ms=500)
    tree: dict[str, Any] = {"count": 2, "codec": Codec.FP16, "rows": two, "tree": (0b1, 0b11)}
    return {
        "hello": Frame(Kind.HELLO, payload=Hello(protocol=1, client="example").to_bytes()),
        "hello-reply": Frame(Kind.HELLO, payload=hello_reply.to_bytes()),
        "open": Frame(Kind.OPEN, handle=1, payload=opening.to_bytes()),
        "open-grant": Frame(Kind.OPEN, handle=1, payload=grant.to_bytes()),
        "attach": Frame(Kind.ATTACH, handle=1, payload=opening.to_bytes()),
        "fork": Frame(Kind.FORK, handle=2, payload=fork.to_bytes()),
        "step": build_step(handle=1, seq=1, first=0, count=1, codec=Codec.FP16, rows=one),
        "reply": Frame(Kind.REPLY, Codec.FP16, handle=1, seq=1, count=1, payload=encode_rows(Codec.FP16, ANSWER)),
        "step-last": build_step(
            handle=1, seq=2, ack=1, first=1, count=2, codec=Codec.FP16, rows=two, flags=Flag.REPLY_LAST
        ),
        "step-replay": build_step(
            handle=1, seq=2, ack=1, first=1, count=2, codec=Codec.FP16, rows=two, flags=Flag.REPLY_NONE
        ),
        "reply-none": Frame(Kind.REPLY, Codec.FP16, handle=1, seq=2, first=1),
        "step-tree": build_step(handle=1, seq=3, ack=2, first=3, **tree),
        "step-accept": build_step(handle=1, seq=4, ack=3, first=5, count=1, codec=Codec.FP16, rows=one, accept=(0, 1)),
        "step-tree-accept": build_step(handle=1, seq=4, ack=3, first=5, accept=(0, 1), **tree),
        "step-int8": build_step(
            handle=1, seq=5, ack=4, first=6, count=1, codec=Codec.INT8, rows=encode_rows(Codec.INT8, ROW)
        ),
        "cancel": Frame(Kind.CANCEL, handle=1, seq=6),
        "cancel-answer": Frame(Kind.CANCEL, handle=1, seq=5, first=7),
        "error": error_frame(1, 6, refusal),
        "resync": Frame(Kind.RESYNC, handle=1, seq=5, first=0),
        "moved": Frame(Kind.MOVED, handle=1, payload=Moved(address="https://other.example:8700").to_bytes()),
        "close": Frame(Kind.CLOSE, handle=1),
        **training_frames(two),
    }


def training_frames(two: bytes) -> dict[str, Frame]:
    """A micro-batch of two sequences of one row each, there and back; the second FORWARD is cut into two frames."""
    join = Join(job="5e" * 8, key="flj-key", client="ward-3", secret=SECRET, blocks=(1, 3), samples=100, have=(0,))
    forward = Forward(generation=1, step=1, micro=0, of=1, targets=2, lengths=(1, 1)).to_bytes()
    backward = Backward(generation=1, step=1, micro=0).to_bytes()
    commit = Commit(generation=1, step=1, samples=2, targets=2, loss=1.5).to_bytes()
    cut_up = list(cut(Message(Kind.FORWARD, 1, forward, Codec.FP16, 2, two), 1, 4, HEADER_SIZE + len(forward) + 8))
    return {
        "join": next(cut(Message(Kind.JOIN, 0, join.to_bytes()), 1, 4, MAX_FRAME_BYTES)),
        "forward": next(cut(Message(Kind.FORWARD, 1, forward, Codec.FP16, 2, two), 1, 4, MAX_FRAME_BYTES)),
        "forward-cut-1": cut_up[0],
        "forward-cut-2": cut_up[1],
        "backward": next(cut(Message(Kind.BACKWARD, 1, backward, Codec.FP16, 2, two), 1, 4, MAX_FRAME_BYTES)),
        "step-commit": next(cut(Message(Kind.STEP, 2, commit), 1, 4, MAX_FRAME_BYTES)),
    }


def codec_states() -> dict[str, Floats]:
    """States worth pinning, by name: ties, ranges, a short last group, an outlier, subnormals."""
    ramp = (np.arange(70, dtype=np.float32) - 35) / 8
    outlier: Floats = ((np.arange(130) % 7 - 3) / 128).astype(np.float32)
    outlier[65] = 1500
    return {
        "ties": np.array([[1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, 0.5, 1.5, 2.5, 127]], np.float32),
        "range": np.array([[0, -0.0, 1e-8, -6e-8, 65504, 65520, -1e38, 3.4e38]], np.float32),
        "two-rows-of-70": np.stack((ramp, ramp * 3)),
        "outlier": outlier[None],
    }


def frame_vectors() -> list[dict[str, Any]]:
    """The frames with their header fields, as JSON."""
    fields = ("codec", "flags", "aux", "handle", "seq", "ack", "first", "count")
    return [
        {
            "name": name,
            "kind": frame.kind.name,
            **{field: int(getattr(frame, field)) for field in fields},
            "payload": bytes(frame.payload).hex(),
            "frame": frame.encode().hex(),
        }
        for name, frame in frames().items()
    ]


def codec_vectors() -> list[dict[str, Any]]:
    """The states in each codec, as JSON: what goes in, the bytes, and what comes out."""
    vectors = []
    for name, states in codec_states().items():
        for codec in Codec:
            encoded = encode_rows(codec, states)
            out = np.empty_like(states)
            decode_rows(codec, encoded, out)
            vectors.append(
                {
                    "name": name,
                    "codec": codec.label,
                    "width": states.shape[1],
                    "states": states.tolist(),
                    "bytes": encoded.hex(),
                    "decoded": out.tolist(),
                }
            )
    return vectors


def write() -> None:
    """Write both files."""
    FOLDER.mkdir(exist_ok=True)
    for name, vectors in (("frames", frame_vectors()), ("codecs", codec_vectors())):
        lines = ",\n".join(json.dumps(vector) for vector in vectors)
        (FOLDER / f"{name}.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    write()
