"""How many tokens one round trip brings with guesses: offline, the whole model in this process, float32, greedy.

    python -m benchmarks.speculation MODEL [MODEL ...] [--head FILE] [--minutes 4 --texts 1200 --prompts 24 --tokens 96]

For each model a draft head is trained on the model's final states along training texts (for `demo`: documents of its
training split; else: the model's own samples at temperature 1), unless `--head` gives one. Then the model answers other
prompts (for `demo`: held-out stories, to be continued, and questions about them; else: the beginnings of other
samples), greedily and by sampling, and the loop that the edge runs is played: propose, verify, accept. A round trip
gives one token and all guesses that were right. The first token, which the prompt's own round trip gives, is not
counted. Each drafter proposes chains of 3, 4 and 6 guesses and trees of 8, 16, 32 and 63.

Verifying here means looking at the text that the model wrote without guesses: in float32 both are the same text.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import record, spread
from edge_client.speculation.combined import CombinedDrafter
from edge_client.speculation.drafter import Drafter, DraftRequest, Guesses
from edge_client.speculation.head_drafter import HeadDrafter
from edge_client.speculation.head_file import TrainedHead, ends_digest, load_head, save_head
from edge_client.speculation.prompt_lookup import PromptLookup
from edge_client.speculation.train_head import Ends, Recipe, Report, train_head
from edge_client.tokenizer import EdgeTokenizer
from split_llama.checkpoint import Checkpoint
from split_llama.config import BlockRange
from split_llama.engine.engine import Engine
from split_llama.engine.sequence import Sequence as Positions
from split_llama.hub import resolve_model
from split_llama.load import load_embedding, load_packed_head, load_packed_segment
from split_llama.products import Numerics

CHAINS = (3, 4, 6)
TREES = (8, 16, 32, 63)
LEAST_CHANCE = 1e-4
AT_ONCE = 8

Texts = list[tuple[list[int], Tensor]]


@dataclass(frozen=True)
class Written:
    """A text that the model wrote: where the answer begins, all tokens, and the final states of all but the last."""

    begin: int
    tokens: list[int]
    states: Tensor


class WholeModel:
    """All blocks in one process."""

    def __init__(self, model: str) -> None:
        self.checkpoint = Checkpoint.open(resolve_model(model))
        numerics = Numerics(torch.float32, "none", torch.device("cpu"))
        blocks = BlockRange(0, self.checkpoint.config.num_hidden_layers)
        self._embedding = load_embedding(self.checkpoint, dtype=torch.float32, device=numerics.device)
        self._head = load_packed_head(self.checkpoint, numerics)
        self._engine = Engine(load_packed_segment(self.checkpoint, blocks, numerics), num_pages=1024)
        self.tokenizer = EdgeTokenizer.open(self.checkpoint.path)
        self.length = self.checkpoint.config.max_position_embeddings

    def ends(self) -> Ends:
        """Embedding and LM head."""
        tied = self.checkpoint.config.tie_word_embeddings
        embedding = self.checkpoint.tensor("model.embed_tokens.weight").float()
        return Ends(embedding, embedding if tied else self.checkpoint.tensor("lm_head.weight").float())

    @torch.inference_mode()
    def _states(self, sequences: Sequence[Positions], tokens: Sequence[Sequence[int]]) -> list[Tensor]:
        rows = self._embedding(torch.tensor([token for each in tokens for token in each]))
        runs = [sequence.append(len(each)) for sequence, each in zip(sequences, tokens, strict=True)]
        states = self._head.norm(self._engine.run(self._engine.plan(runs), rows))
        return list(states.split([len(each) for each in tokens]))

    def read(self, tokens: Sequence[int]) -> Tensor:
        """Final states of a text, [n, d]."""
        sequence = self._engine.sequence(self._engine.blocks, self.length)
        (states,) = self._states([sequence], [tokens])
        sequence.free()
        return states.clone()

    @torch.inference_mode()
    def write(self, prompts: Sequence[Sequence[int]], count: int, temperature: float, seed: int) -> list[Written]:
        """Continue prompts together until an end token or `count` tokens."""
        draw = torch.Generator().manual_seed(seed)
        ending = set(self.checkpoint.generation_config().eos_token_ids)
        sequences = [self._engine.sequence(self._engine.blocks, self.length) for _ in prompts]
        texts, new = [list(prompt) for prompt in prompts], [list(prompt) for prompt in prompts]
        states: list[list[Tensor]] = [[] for _ in prompts]
        live = list(range(len(prompts)))
        for _ in range(count):
            fresh = self._states([sequences[i] for i in live], [new[i] for i in live])
            logits = self._head.lm_head(torch.stack([rows[-1] for rows in fresh])).float()
            picks = logits.argmax(-1) if temperature == 0 else _sample(logits / temperature, draw)
            for i, rows, token in zip(live, fresh, picks.tolist(), strict=True):
                states[i].append(rows)
                texts[i].append(token)
                new[i] = [token]
            live = [i for i in live if new[i][0] not in ending and len(texts[i]) < self.length]
            if not live:
                break
        for sequence in sequences:
            sequence.free()
        return [
            Written(len(prompt), text, torch.cat(rows).clone())
            for prompt, text, rows in zip(prompts, texts, states, strict=True)
        ]


def _sample(logits: Tensor, draw: torch.Generator) -> Tensor:
    return torch.multinomial(logits.softmax(-1), 1, generator=draw)[:, 0]


def own_samples(model: WholeModel, texts: int, seed: int) -> list[Written]:
    """Let the model write from BOS at temperature 1."""
    begin = [[model.checkpoint.generation_config().bos_token_id or 0]] * AT_ONCE
    written: list[Written] = []
    while len(written) < texts:
        written += model.write(begin, min(256, model.length - 1), 1.0, seed + len(written))
    return written[:texts]


def demo_texts(model: WholeModel, texts: int) -> Texts:
    """Read documents of the demo model's training split."""
    from training.demo.corpus import documents

    found = []
    for document, _ in zip(documents(7), range(texts), strict=False):
        text = "".join(piece.text for piece in document)
        tokens = model.tokenizer.encode(text, special_tokens=False)[: model.length]
        found.append((tokens, model.read(tokens)))
    return found


def demo_prompts(model: WholeModel, count: int) -> dict[str, list[list[int]]]:
    """Held-out stories: beginnings to be continued, questions, chats."""
    from training.demo.corpus import draw_story, story_text
    from training.demo.evaluate import cases

    draw = random.Random(11)
    stories = [story_text(draw_story(draw, "story").events, "past", draw) for _ in range(count)]
    prompts = {"stories": [model.tokenizer.encode(story)[:24] for story in stories]}
    prompts["questions"] = [model.tokenizer.encode(case.prompt) for case in cases(5, count, "story", "plain")]
    prompts["chats"] = [model.tokenizer.encode(case.prompt) for case in cases(5, count, "story", "chat")]
    return {name: [ids[: model.length - 100] for ids in found] for name, found in prompts.items()}


def train(model: WholeModel, name: str, options: argparse.Namespace) -> tuple[TrainedHead, Report]:
    """Train a head on the model's states."""
    if name == "demo":
        texts = demo_texts(model, options.texts)
    else:
        written = own_samples(model, options.texts, seed=1000)
        texts = [(text.tokens[:-1], text.states) for text in written]
    recipe = Recipe(seconds=60 * options.minutes, epochs=options.epochs)
    head, vocabulary, report = train_head(texts, model.ends(), recipe, progress=_show)
    about = {"positions": report.positions, "steps": report.steps, "accuracy": report.accuracy}
    return TrainedHead(head, vocabulary, ends_digest(model.checkpoint), about), report


def _show(share: float, line: str) -> None:
    if int(line.split()[1].rstrip(",")) % 1000 == 0:
        print(f"{share:4.0%} {line}", flush=True)


def play(drafter: Drafter, text: Written, limit: int, times: list[float], *, chain: bool) -> dict[str, float]:
    """Play the edge's loop over a written text; give tokens, round trips, guesses, and add milliseconds to `times`."""
    at = text.begin
    played = {"tokens": 0.0, "round_trips": 0.0, "guesses": 0.0, "stated": 0.0}
    # tokens[at] was sampled from the prompt's round trip: everything after it counts.
    while at + 1 < len(text.tokens):
        begin = time.perf_counter()
        request = DraftRequest(text.tokens[: at + 1], text.states[at - 1], 63 if chain else limit, LEAST_CHANCE)
        (guesses,) = drafter.propose([request])
        times.append((time.perf_counter() - begin) * 1000)
        if chain:
            guesses = likeliest_chain(guesses, limit)
        played["guesses"] += len(guesses)
        played["stated"] += sum(guesses.chances)
        node, right = -1, 0
        while at + right + 1 < len(text.tokens) - 1:
            child = guesses.child(node, text.tokens[at + right + 1])
            if child is None:
                break
            node, right = child, right + 1
        played["round_trips"] += 1
        played["tokens"] += right + 1
        at += right + 1
    return played


def likeliest_chain(guesses: Guesses, limit: int) -> Guesses:
    """Follow the likeliest child from the root."""
    node, tokens, chances = -1, [], []
    while len(tokens) < limit:
        children = [child for child, parent in enumerate(guesses.parents) if parent == node]
        if not children:
            break
        node = max(children, key=lambda child: guesses.chances[child])
        tokens.append(guesses.tokens[node])
        chances.append(guesses.chances[node])
    return Guesses(tuple(tokens), tuple(range(-1, len(tokens) - 1)), tuple(chances))


def measure(make: Callable[[], Drafter], texts: Sequence[Written]) -> list[dict[str, Any]]:
    """Play all sizes of chains and trees over the texts."""
    rows = []
    for kind, limits in (("chain", CHAINS), ("tree", TREES)):
        for limit in limits:
            drafter = make()
            times: list[float] = []
            played = [play(drafter, text, limit, times, chain=kind == "chain") for text in texts]
            total = {key: sum(each[key] for each in played) for key in played[0]}
            per_text = [each["tokens"] / each["round_trips"] for each in played if each["round_trips"]]
            rows.append(
                {
                    "shape": kind,
                    "guesses": limit,
                    "tokens_per_round_trip": total["tokens"] / total["round_trips"],
                    "per_text": spread(per_text),
                    "sent_per_round_trip": total["guesses"] / total["round_trips"],
                    "accepted_per_stated": (total["tokens"] - total["round_trips"]) / max(total["stated"], 1e-9),
                    "ms_per_proposal": spread(times)["median"],
                }
            )
    return rows


def compare(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train, write and measure for one model."""
    model = WholeModel(name)
    training: dict[str, Any] = {}
    if options.head:
        trained = load_head(options.head, ends_digest(model.checkpoint))
    else:
        trained, report = train(model, name, options)
        training = {"positions": report.positions, "seconds": report.seconds, "accuracy_by_depth": report.accuracy}
        if options.save:
            save_head(options.save / f"{Path(name).name}.safetensors", trained)
    prompts = demo_prompts(model, options.prompts) if name == "demo" else None
    if prompts is None:
        prompts = {"other samples": [text.tokens[:16] for text in own_samples(model, options.prompts, seed=5000)]}
    drafters: dict[str, Callable[[], Drafter]] = {
        "lookup": PromptLookup,
        "head": lambda: HeadDrafter.of(trained, model.checkpoint),
        "combined": lambda: CombinedDrafter(PromptLookup(), HeadDrafter.of(trained, model.checkpoint)),
    }
    results = []
    for temperature in (0.0, 1.0):
        for kind, beginnings in prompts.items():
            texts = model.write(beginnings, options.tokens, temperature, 77)
            for drafter, make in drafters.items():
                for row in measure(make, texts):
                    results.append({"text": kind, "temperature": temperature, "drafter": drafter} | row)
                    print(
                        Path(name).name,
                        kind,
                        temperature,
                        drafter,
                        row["shape"],
                        row["guesses"],
                        f"{row['tokens_per_round_trip']:.2f} {row['ms_per_proposal']:.2f} ms",
                        flush=True,
                    )
    size = trained.head.parameter_bytes
    return {"model": Path(name).name, "head_bytes_float32": size, "training": training, "rows": results}


def main() -> None:
    """Run and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--head", type=Path, metavar="FILE", help="use this head instead of training one")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="keep the trained heads there")
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--epochs", type=float, default=12.0)
    parser.add_argument("--texts", type=int, default=1200)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--record", default="speculation-offline", metavar="NAME", help="name of the file in results/")
    options = parser.parse_args()
    torch.set_num_threads(1)
    record(options.record, {"models": [compare(model, options) for model in options.models]})


if __name__ == "__main__":
    main()
