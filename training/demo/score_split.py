"""Score the demo model as its users meet it: through a running split-server, with the edge's noise and codec.

    split-server demo &
    split-train demo-score-split --server http://127.0.0.1:8700 [--count 500 --noise mean-abs=0.02 --partition 1,1]

Prints the same tables as `demo-score`, for stories never seen in training.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence

from edge_client.runtime import EdgeRuntime
from edge_client.settings import EdgeSettings
from training.demo.evaluate import MAX_ANSWER_TOKENS, STYLES, cases, grade, table

SESSIONS = 16


async def _answers(edge: EdgeRuntime, prompts: Sequence[str]) -> list[str]:
    """Greedy answers, `SESSIONS` at a time."""
    places = asyncio.Semaphore(SESSIONS)

    async def answer(prompt: str) -> str:
        ids = edge.tokenizer.encode(prompt)
        turn = edge.turn(ids, edge.params(max_new_tokens=MAX_ANSWER_TOKENS, temperature=0.0))
        async with places, edge.open() as session:
            return "".join([event.text async for event in session.generate(ids, turn)])

    return await asyncio.gather(*map(answer, prompts))


async def _score(settings: EdgeSettings, seed: int, count: int) -> None:
    async with EdgeRuntime.connect(settings, max_sessions=SESSIONS) as edge:
        for split in ("story", "pair"):
            for style in STYLES:
                asked = cases(seed, count, split, style)
                answers = await _answers(edge, [case.prompt for case in asked])
                sys.stdout.write(f"\nsplit {split}, {style}\n{table(grade(asked, answers))}\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Score through the server at `--server`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", required=True, metavar="URL")
    parser.add_argument("--count", type=int, default=500, help="questions for each table (default: 500)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the held-out stories (default: 1)")
    parser.add_argument("--noise", default="mean-abs=0.02")
    parser.add_argument("--codec", default="fp16")
    parser.add_argument("--partition", default="1,1")
    options = parser.parse_args(arguments)
    settings = EdgeSettings(
        server=options.server, model="demo", noise=options.noise, codec=options.codec, partition=options.partition
    )
    asyncio.run(_score(settings, options.seed, options.count))


if __name__ == "__main__":
    main()
