"""Bytes per token on the wire: frame, WebSocket and payload, for every codec and some widths. Counted, not modelled.

    python -m benchmarks.wire_bytes

A one-token step and its reply are built and framed exactly as the edge and the server do; what the WebSocket adds is
counted by the websockets library's own framing.
"""

from __future__ import annotations

import numpy as np
from websockets.frames import Frame as WebSocketFrame
from websockets.frames import Opcode

from benchmarks.common import record
from split_llama.wire.codec import Codec, encode_rows, row_bytes
from split_llama.wire.frame import Frame, Kind

WIDTHS = (64, 768, 4096, 8192)


def on_the_wire(frame: Frame, mask: bool) -> int:
    """Bytes of the frame in one WebSocket message; the client's messages are masked (RFC 6455, section 5.3)."""
    return len(WebSocketFrame(Opcode.BINARY, frame.encode()).serialize(mask=mask))


def main() -> None:
    """Count and record."""
    rows = []
    for width in WIDTHS:
        states = np.random.default_rng(0).standard_normal((1, width)).astype(np.float32)
        for codec in Codec:
            payload = encode_rows(codec, states)
            step = Frame(Kind.STEP, codec=codec, handle=1, seq=9, ack=8, first=100, count=1, payload=payload)
            reply = Frame(Kind.REPLY, codec=codec, handle=1, seq=9, first=100, count=1, payload=payload)
            row = {
                "width": width,
                "codec": codec.label,
                "payload": row_bytes(codec, width),
                "up": on_the_wire(step, mask=True),
                "down": on_the_wire(reply, mask=False),
            }
            rows.append(row)
            print(row)
    record("wire_bytes", {"rows": rows})


if __name__ == "__main__":
    main()
