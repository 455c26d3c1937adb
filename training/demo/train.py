"""Train the demo model from nothing: ``python -m training.demo.train --out FOLDER --minutes 60``.

It learns from answers, and from the hints of `guide`, without which it would need many times as long. Gaussian noise
after one of the first three blocks is part of training, because the edge adds noise there.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

from training.demo.batches import Batch, pool
from training.demo.evaluate import MAX_ANSWER_TOKENS, STYLES, cases, grade
from training.demo.generate import Generator, noise_after_block
from training.demo.guide import FACT_STATES, SUBJECT_STATES, VERDICT_STATES, Guide
from training.demo.model import CONTEXT, build_model, write_model
from training.demo.tokenizer import DocumentEncoder, train_tokenizer

_log = logging.getLogger(__name__)

_NOISE_SIGMA = 0.05
_NOISE_BLOCKS = 3
_SUBJECT_WEIGHT = 0.3
_LOOKUP_WEIGHT = 0.1
_VERDICT_WEIGHT = 2.0


@dataclass(frozen=True)
class Settings:
    """One training run. It ends after `minutes` of wall clock or `tokens` tokens, whichever is given.

    Equal seeds give equal data and initial weights; only a run by `tokens` also repeats its learning rates.
    """

    out: Path
    seed: int = 0
    minutes: float | None = None
    tokens: int | None = None
    batch_tokens: int = 4096
    lr: float = 6e-3
    device: str = "auto"
    threads: int = 0
    save_minutes: float = 5.0
    resume: bool = False

    def progress(self, tokens: int, seconds: float) -> float:
        """How much of the run is done, from 0 to 1."""
        if self.tokens is not None:
            return min(1.0, tokens / self.tokens)
        assert self.minutes is not None, "parse() requires one of them"
        return min(1.0, seconds / (60 * self.minutes))


def learning_rate(progress: float) -> float:
    """The share of the peak rate: a short warm-up, a plateau, then a straight line down to zero."""
    return min(1.0, progress / 0.01, (1.0 - progress) / 0.45)


def weighted_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Mean next-token loss under the batch's weights; `logits` [rows, length, vocabulary]."""
    losses = cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch.ids[:, 1:].flatten(), reduction="none")
    weights = batch.weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


class Trainer:
    """The model, its optimizers and how far they are."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        torch.manual_seed(settings.seed)
        self._random = random.Random(settings.seed)
        self.device = _device(settings.device)
        self.tokenizer = train_tokenizer(settings.seed)
        self.encoder = DocumentEncoder(self.tokenizer)
        self.model = build_model(self.tokenizer)
        nn.Module.to(self.model, self.device)
        self.guide = Guide(self.tokenizer, self.model.config.hidden_size).to(self.device)
        self.optimizers = _optimizers(self.model, self.guide, settings.lr)
        self.pool = self.tokens = 0
        self.seconds = 0.0
        self._state = settings.out.with_name(settings.out.name + ".state.pt")
        if settings.resume:
            self._load()

    def run(self) -> None:
        """Train to the end; print progress, and write the model folder every few minutes and at the end."""
        start, saved, shown = time.monotonic() - self.seconds, self.seconds, self.seconds
        for step, batch in enumerate(self._batches()):
            loss = self._step(batch, self.settings.progress(self.tokens, self.seconds))
            self.tokens += batch.tokens
            self.seconds = time.monotonic() - start
            done = self.settings.progress(self.tokens, self.seconds)
            if self.seconds - shown >= 15 or done >= 1:
                shown = self.seconds
                self._show(step, float(loss), done)
            if self.seconds - saved >= 60 * self.settings.save_minutes or done >= 1:
                saved = self.seconds
                self._save()
                self._evaluate()
            if done >= 1:
                break
        self._state.unlink(missing_ok=True)

    def _batches(self) -> Iterator[Batch]:
        while True:
            for batch in pool(self.encoder, self.settings.seed, self.pool, self.settings.batch_tokens, CONTEXT):
                yield Batch(batch.ids.to(self.device), batch.weights.to(self.device))
            self.pool += 1

    def _step(self, batch: Batch, progress: float) -> Tensor:
        """One update; returns the loss without the hints."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * learning_rate(progress)
        # The noise grows over the first tenth: a model that knows nothing yet cannot learn to see through it.
        sigma = torch.rand(len(batch.ids), 1, 1, device=self.device) * _NOISE_SIGMA * min(1.0, progress / 0.1)
        noise = noise_after_block(self.model, self._random.randrange(_NOISE_BLOCKS), sigma)
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            output = self.model(input_ids=batch.ids, use_cache=False, output_hidden_states=True, output_attentions=True)
            loss = weighted_loss(output.logits, batch)
            subject = self.guide.subject_loss(output.hidden_states[SUBJECT_STATES], batch.ids)
            lookup = self.guide.lookup_loss(output.attentions, batch)
            claim = self._claim_loss(output.hidden_states, batch)
        noise.remove()
        torch.autograd.backward(loss + _SUBJECT_WEIGHT * subject + _LOOKUP_WEIGHT * lookup + claim)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    def _claim_loss(self, states: Sequence[Tensor], batch: Batch) -> Tensor:
        """How badly the head reads the true fact, and later Yes or No, off a question's claim in the blocks' states."""
        verdicts = self.guide.verdicts(batch)
        facts = self.guide.first_facts(batch, verdicts, self.guide.sources(batch))
        if len(verdicts.rows) == 0 or not (facts >= 0).any():
            return states[0].sum() * 0.0
        found = self._read(states[FACT_STATES][verdicts.rows, verdicts.asked][facts >= 0])
        said = self._read(states[VERDICT_STATES][verdicts.rows, verdicts.asked])
        words = batch.ids[verdicts.rows, facts][facts >= 0]
        return cross_entropy(found, words) + _VERDICT_WEIGHT * cross_entropy(said, verdicts.ids)

    def _read(self, states: Tensor) -> Tensor:
        logits: Tensor = self.model.lm_head(self.model.model.norm(states))
        return logits.float()

    def _show(self, step: int, loss: float, done: float) -> None:
        left = self.seconds / max(done, 1e-9) * (1 - done)
        rate = self.tokens / self.seconds
        _log.info(
            "step %d loss %.4f tokens %d (%.0f/s) %.1f%% ETA %.1f min",
            step,
            loss,
            self.tokens,
            rate,
            100 * done,
            left / 60,
        )

    @torch.no_grad()
    def _evaluate(self, count: int = 100) -> None:
        self.model.train(False)
        generator = Generator(self.model, self.tokenizer, self.model.generation_config.eos_token_id)
        for style in STYLES:
            asked = cases(0, count, "pair", style)
            tallies = grade(asked, generator.answers([case.prompt for case in asked], MAX_ANSWER_TOKENS))
            _log.info("held-out %s: %s", style, ", ".join(f"{name} {t.accuracy:.0%}" for name, t in tallies.items()))
        self.model.train()

    def _save(self) -> None:
        write_model(self.model, self.tokenizer, self.settings.out)
        state = {
            "model": self.model.state_dict(),
            "guide": self.guide.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "progress": (self.pool, self.tokens, self.seconds),
        }
        torch.save(state, self._state.with_suffix(".new"))
        os.replace(self._state.with_suffix(".new"), self._state)

    def _load(self) -> None:
        state = torch.load(self._state, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.guide.load_state_dict(state["guide"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.pool, self.tokens, self.seconds = state["progress"]


def _device(name: str) -> torch.device:
    return torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")


def _optimizers(model: LlamaForCausalLM, guide: Guide, lr: float) -> list[torch.optim.Optimizer]:
    blocks = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    inside = set(map(id, blocks))
    others = [weight for weight in (*model.parameters(), *guide.parameters()) if id(weight) not in inside]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(blocks, lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr / 2, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def parse(arguments: Sequence[str] | None = None) -> Settings:
    """Settings from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="model folder to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of tokenizer, data and initial weights (default: 0)")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, help="how long to train")
    length.add_argument("--tokens", type=int, help="how many tokens to train on")
    parser.add_argument(
        "--batch-tokens", type=int, default=Settings.batch_tokens, help="tokens of a batch (default: %(default)s)"
    )
    parser.add_argument("--lr", type=float, default=Settings.lr, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads, 0 for torch's choice (default: 0)")
    parser.add_argument("--save-minutes", type=float, default=5.0, help="between checkpoints (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint beside --out")
    return Settings(**vars(parser.parse_args(arguments)))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    settings = parse(arguments)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    Trainer(settings).run()


if __name__ == "__main__":
    main()
