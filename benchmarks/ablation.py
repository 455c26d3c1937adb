"""The paper's ablation (arXiv 2505.15683): KV cache on or off, and the attention mask dense, compressed or not sent.

    python -m benchmarks.ablation [--contexts 128 512 2048 --tokens 4 --threads 1 --mbit 100]

The 134M random model, split over loopback. Without a KV cache each token sends, computes and receives the whole prefix
again. A mask costs what it takes to build it, send it to a peer on loopback and have it acknowledged before the step:
dense is `rows x keys` in fp16 as in the paper's code, compressed is five int32 per step, none is this project's wire.
`link_ms` adds the time that all bytes of the step take on a link of `--mbit`; it is computed, the rest is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import MODEL_134M, record, running_server, write_random_model
from benchmarks.split_decode import prompt_ids
from edge_client.runtime import EdgeRuntime
from edge_client.settings import EdgeSettings

MaskBytes = Callable[[int, int], bytes]


def dense_mask(rows: int, keys: int) -> bytes:
    """The causal mask `[rows, keys]` of the last `rows` positions, fp16: 0 visible, -inf hidden."""
    first = keys - rows
    hidden = torch.arange(keys)[None] > torch.arange(first, keys)[:, None]
    mask = torch.zeros(rows, keys, dtype=torch.float16).masked_fill(hidden, float("-inf"))
    return mask.numpy().tobytes()


def compressed_mask(rows: int, keys: int) -> bytes:
    """Five int32 that say the same."""
    return torch.tensor([keys - rows, rows, keys, 0, 0], dtype=torch.int32).numpy().tobytes()


MASKS: dict[str, MaskBytes] = {"dense": dense_mask, "compressed": compressed_mask, "none": lambda rows, keys: b""}


class MaskPeer:
    """A peer on loopback that takes masks and acknowledges each."""

    async def __aenter__(self) -> MaskPeer:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", port)
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._writer.close()
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                size = int.from_bytes(await reader.readexactly(8), "little")
                await reader.readexactly(size)
                writer.write(b"k")
        except asyncio.IncompleteReadError:
            writer.close()

    async def send(self, mask: bytes) -> None:
        """Send one mask and wait until it has arrived."""
        if mask:
            self._writer.write(len(mask).to_bytes(8, "little") + mask)
            await self._reader.readexactly(1)


async def with_cache(edge: EdgeRuntime, ids: list[int], tokens: int, mask: MaskBytes, peer: MaskPeer) -> dict[str, Any]:
    """Decode with KV caches: each step is one row."""
    mask_bytes = 0
    async with edge.open() as session:
        turn = edge.turn(ids, edge.params(max_new_tokens=tokens + 1, ignore_eos=True, temperature=0.0))
        begin, frames = 0.0, (0, 0)
        async for _ in session.generate(ids, turn):
            if len(turn.tokens) == 1:
                begin, frames = time.perf_counter(), (session.stats.bytes_up, session.stats.bytes_down)
            if len(turn.tokens) <= tokens:
                built = mask(1, len(ids) + len(turn.tokens))
                mask_bytes += len(built)
                await peer.send(built)
        seconds = time.perf_counter() - begin
        up, down = session.stats.bytes_up - frames[0], session.stats.bytes_down - frames[1]
    return figures(seconds, up, down, mask_bytes, tokens)


async def without_cache(
    edge: EdgeRuntime, ids: list[int], tokens: int, mask: MaskBytes, peer: MaskPeer
) -> dict[str, Any]:
    """Decode without KV caches: each token runs the whole prefix in a fresh session."""
    up = down = mask_bytes = 0
    begin = time.perf_counter()
    for _ in range(tokens):
        built = mask(len(ids), len(ids))
        mask_bytes += len(built)
        await peer.send(built)
        async with edge.open() as session:
            turn = edge.turn(ids, edge.params(max_new_tokens=1, ignore_eos=True, temperature=0.0))
            async for event in session.generate(ids, turn):
                ids = [*ids, event.token]
            up, down = up + session.stats.bytes_up, down + session.stats.bytes_down
    return figures(time.perf_counter() - begin, up, down, mask_bytes, tokens)


def figures(seconds: float, up: int, down: int, mask: int, tokens: int) -> dict[str, Any]:
    """Per token: milliseconds and bytes."""
    return {
        "ms_per_token": seconds / tokens * 1000,
        "bytes_up": up // tokens,
        "bytes_down": down // tokens,
        "mask_bytes": mask // tokens,
    }


async def measure(folder: Path, url: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run every combination."""
    settings = EdgeSettings(
        server=url, model=str(folder), noise="0", codec="fp16", threads=options.threads, speculate="off"
    )
    rows = []
    async with EdgeRuntime.connect(settings) as edge, MaskPeer() as peer:
        for context in options.contexts:
            ids = prompt_ids(context, 0)
            for cache, decode, tokens in (
                ("on", with_cache, 8 * options.tokens),
                ("off", without_cache, options.tokens),
            ):
                for name, mask in MASKS.items():
                    row = {"context": context, "kv_cache": cache, "mask": name}
                    row |= await decode(edge, ids, tokens, mask, peer)
                    sent = row["bytes_up"] + row["bytes_down"] + row["mask_bytes"]
                    row["link_ms"] = row["ms_per_token"] + sent * 8 / options.mbit / 1000
                    rows.append(row)
                    print(row, flush=True)
    return rows


def main() -> None:
    """Run and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 512, 2048])
    parser.add_argument("--tokens", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--mbit", type=float, default=100.0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_random_model(Path(temporary) / "model", MODEL_134M)
        with running_server(folder, "--threads", str(options.threads), "--dtype", "float32") as url:
            rows = asyncio.run(measure(folder, url, options))
    record("ablation", {"options": vars(options), "rows": rows})


if __name__ == "__main__":
    main()
