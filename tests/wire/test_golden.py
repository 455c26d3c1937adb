from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from wire.make_golden import FOLDER, codec_states, codec_vectors, frame_vectors, frames

from split_llama.wire.codec import Codec, decode_rows, encode_rows
from split_llama.wire.control import Fork, Hello, HelloReply, Moved, Open
from split_llama.wire.frame import Frame, Kind
from split_llama.wire.step import parse_step

FRAMES: list[dict[str, Any]] = json.loads((FOLDER / "frames.json").read_text(encoding="utf-8"))
CODECS: list[dict[str, Any]] = json.loads((FOLDER / "codecs.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("vector", FRAMES, ids=lambda vector: str(vector["name"]))
def test_frames_have_the_committed_bytes_and_read_back(vector: dict[str, Any]) -> None:
    frame = frames()[vector["name"]]
    assert frame.encode().hex() == vector["frame"]
    assert Frame.decode(bytes.fromhex(vector["frame"])) == frame
    assert bytes(frame.payload).hex() == vector["payload"]


@pytest.mark.parametrize("vector", CODECS, ids=lambda vector: f"{vector['name']}-{vector['codec']}")
def test_codecs_have_the_committed_bytes_and_read_back(vector: dict[str, Any]) -> None:
    states = codec_states()[vector["name"]]
    codec = Codec.parse(vector["codec"])
    assert (states == np.array(vector["states"], np.float32)).all()
    assert encode_rows(codec, states).hex() == vector["bytes"]
    out = np.empty_like(states)
    decode_rows(codec, bytes.fromhex(vector["bytes"]), out)
    assert (out == np.array(vector["decoded"], np.float32)).all()


def test_the_committed_files_are_complete() -> None:
    assert frame_vectors() == FRAMES
    assert codec_vectors() == CODECS
    assert {vector["kind"] for vector in FRAMES} == {kind.name for kind in Kind}
    assert {vector["codec"] for vector in CODECS} == {codec.label for codec in Codec}


def test_golden_payloads_are_valid() -> None:
    models: dict[str, type[Any]] = {
        "hello": Hello,
        "hello-reply": HelloReply,
        "open": Open,
        "attach": Open,
        "fork": Fork,
        "moved": Moved,
    }
    for name, model in models.items():
        payload = frames()[name].payload
        assert model.from_bytes(payload).to_bytes() == payload
    for name, frame in frames().items():
        if frame.kind is Kind.STEP and name != "step-commit":
            assert len(parse_step(frame, 4).rows) == len(frame.payload) - {
                "step-tree": 16,
                "step-accept": 8,
                "step-tree-accept": 24,
            }.get(name, 0)
