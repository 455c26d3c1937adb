"""`edge-client train-drafter`: train a draft head for the model of a server, from texts or the model's own samples."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from edge_client.commands.loading import load_edge
from edge_client.printable import printable
from edge_client.settings import EdgeSettings
from split_llama.errors import UsageError
from split_llama.settings import add_flags

if TYPE_CHECKING:
    from edge_client.runtime import EdgeRuntime
    from edge_client.speculation.collect import Collected
    from edge_client.speculation.train_head import Report

MOST_MINUTES = 7 * 24 * 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.add_argument(
        "--text", action="append", default=[], type=Path, metavar="FILE", help="text to learn from, a document per line"
    )
    parser.add_argument(
        "--samples", type=int, default=0, metavar="N", help="let the model write N texts of its own to learn from"
    )
    parser.add_argument("--chats", action="store_true", help="learn from the chats kept by --learn-from-chats")
    parser.add_argument("--minutes", type=float, default=5.0, metavar="M", help="how long to train at most (5)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: where --speculate auto finds it")
    add_flags(parser, EdgeSettings)


def run(arguments: argparse.Namespace) -> int:
    """Train a head and leave it where it is found."""
    settings = load_edge(arguments).settings
    settings.check()
    _check(arguments)
    import asyncio

    asyncio.run(train(settings, arguments))
    return 0


def _check(arguments: argparse.Namespace) -> None:
    if not (arguments.text or arguments.samples or arguments.chats):
        raise UsageError("what should the draft head learn from? Give --text FILE, --samples N or --chats")
    if arguments.samples < 0:
        raise UsageError(f"--samples must be 1 or more, got {arguments.samples}")
    if not 0 < arguments.minutes <= MOST_MINUTES:
        raise UsageError(f"--minutes must be above 0 and at most {MOST_MINUTES:.0f}, got {arguments.minutes}")
    for file in arguments.text:
        if not file.is_file():
            raise UsageError(f"--text {file}: there is no such file")


async def train(settings: EdgeSettings, arguments: argparse.Namespace) -> None:
    """Collect the model's states through the split, train on them, write the head."""
    from edge_client.runtime import EdgeRuntime
    from edge_client.speculation.head_file import TrainedHead, ends_digest, head_path, save_head
    from edge_client.speculation.train_head import Ends, Recipe, train_head
    from edge_client.threads import in_thread
    from split_llama.checkpoint import Checkpoint

    async with EdgeRuntime.connect(settings, notify=_say) as edge:
        collected = await _collect(edge, settings, arguments)
        checkpoint = Checkpoint.open(edge.source.folder)
    digest = ends_digest(checkpoint)
    embedding = checkpoint.tensor("model.embed_tokens.weight")
    tied = checkpoint.config.tie_word_embeddings
    ends = Ends(embedding, embedding if tied else checkpoint.tensor("lm_head.weight"))
    recipe = Recipe(seconds=60 * arguments.minutes)
    head, vocabulary, report = await in_thread(lambda: train_head(collected, ends, recipe, progress=_show))
    about = {"positions": report.positions, "steps": report.steps, "accuracy": report.accuracy}
    path = arguments.output or head_path(settings.states(), digest)
    save_head(path, TrainedHead(head, vocabulary, digest, about))
    _tell(report, path)


async def _collect(edge: EdgeRuntime, settings: EdgeSettings, arguments: argparse.Namespace) -> Collected:
    from edge_client.speculation.collect import collect, draw_samples, read_documents
    from edge_client.speculation.head_file import ends_digest
    from edge_client.speculation.transcripts import TranscriptStore
    from split_llama.checkpoint import Checkpoint

    documents = read_documents(edge, arguments.text)
    if arguments.chats:
        store = TranscriptStore(settings.states(), ends_digest(Checkpoint.open(edge.source.folder)))
        chats = [ids[: edge.max_length - 1] for ids in store.read()]
        if not chats and not documents and not arguments.samples:
            raise UsageError(f"no chats are kept in {store.path}; they are with --learn-from-chats")
        documents += chats
    documents += await draw_samples(edge, arguments.samples, _progress)
    rows = sum(len(ids) for ids in documents)
    _say(f"{len(documents)} texts with {rows} tokens go through the server, as in a generation")
    collected = await collect(edge, documents, _progress)
    _progress("")
    return collected


def _say(line: str) -> None:
    sys.stderr.write(printable(line) + "\n")


def _progress(line: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{printable(line)}")
        sys.stderr.flush()


def _show(share: float, line: str) -> None:
    _progress(f"training {share:.0%}: {line}")


def _tell(report: Report, path: Path) -> None:
    _progress("")
    after = ", ".join(f"{share:.0%}" for share in report.accuracy)
    _say(
        f"trained {report.steps} steps in {report.seconds:.0f} s on {report.positions} tokens; its first guess is the "
        f"model's own choice, 1 to {len(report.accuracy)} tokens ahead: {after} (on {report.held_out} held-out tokens)"
    )
    _say(f"wrote {path}")
