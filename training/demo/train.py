"""Train the demo model from nothing: ``python -m training.demo.train --out FOLDER --minutes 60``.

Gaussian noise after one of the first three blocks is part of training, because the edge adds noise there.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from training.demo.batches import Batch, pool
from training.demo.corpus import BOS, END, EOS, PAD
from training.demo.evaluate import MAX_ANSWER_TOKENS, STYLES, cases, grade
from training.demo.generate import Generator, noise_after_block
from training.demo.tokenizer import DocumentEncoder, save_tokenizer, train_tokenizer

CONTEXT = 1024
_NOISE_SIGMA = 0.05
_NOISE_BLOCKS = 3


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


def build_model(tokenizer: Tokenizer) -> LlamaForCausalLM:
    """A fresh fp32 model of the demo's geometry; its initial weights come from torch's global generator."""
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=128,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=384,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=tokenizer.token_to_id(EOS),
        pad_token_id=tokenizer.token_to_id(PAD),
    )
    model = LlamaForCausalLM(config)
    # Half as fast again as the fused kernel, whose backward pass on CPUs dominates at these lengths.
    model.set_attn_implementation("eager")
    # Rows much larger than the default 0.02, so that the noise after the first block does not drown the words.
    nn.init.normal_(model.model.embed_tokens.weight, std=0.5)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=[config.eos_token_id, tokenizer.token_to_id(END)],
        pad_token_id=config.pad_token_id,
        do_sample=False,
    )
    return model


def write_model(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Write the model folder in bfloat16, each file complete before it takes its name."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as name:
        folder = Path(name)
        stored = LlamaForCausalLM(model.config)
        stored.load_state_dict(model.state_dict())
        stored.generation_config = model.generation_config
        stored.to(torch.bfloat16).save_pretrained(folder)
        save_tokenizer(tokenizer, folder, CONTEXT)
        for file in folder.iterdir():
            os.replace(file, out / file.name)


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
        self.model = build_model(self.tokenizer).to(self.device)
        self.optimizers = _optimizers(self.model, settings.lr)
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
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * learning_rate(progress)
        # The noise grows over the first tenth: a model that knows nothing yet cannot learn to see through it.
        sigma = torch.rand(len(batch.ids), 1, 1, device=self.device) * _NOISE_SIGMA * min(1.0, progress / 0.1)
        noise = noise_after_block(self.model, self._random.randrange(_NOISE_BLOCKS), sigma)
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            loss = weighted_loss(self.model(input_ids=batch.ids, use_cache=False).logits, batch)
        noise.remove()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    def _show(self, step: int, loss: float, done: float) -> None:
        left = self.seconds / max(done, 1e-9) * (1 - done)
        rate = self.tokens / self.seconds
        print(
            f"step {step} loss {loss:.4f} tokens {self.tokens:,} ({rate:,.0f}/s) {done:.1%} ETA {left / 60:.1f} min",
            flush=True,
        )

    @torch.no_grad()
    def _evaluate(self, count: int = 200) -> None:
        self.model.eval()
        generator = Generator(self.model, self.tokenizer, self.model.generation_config.eos_token_id)
        for style in STYLES:
            asked = cases(0, count, "pair", style)
            tallies = grade(asked, generator.answers([case.prompt for case in asked], MAX_ANSWER_TOKENS))
            kinds = {name: f"{tally.accuracy:.0%}" for name, tally in tallies.items()}
            print(f"held-out {style}: " + ", ".join(f"{name} {share}" for name, share in kinds.items()), flush=True)
        self.model.train()

    def _save(self) -> None:
        write_model(self.model, self.tokenizer, self.settings.out)
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "progress": (self.pool, self.tokens, self.seconds),
        }
        torch.save(state, self._state.with_suffix(".new"))
        os.replace(self._state.with_suffix(".new"), self._state)

    def _load(self) -> None:
        state = torch.load(self._state, map_location=self.device)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.pool, self.tokens, self.seconds = state["progress"]


def _device(name: str) -> torch.device:
    return torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")


def _optimizers(model: LlamaForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    blocks = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    inside = set(map(id, blocks))
    others = [weight for weight in model.parameters() if id(weight) not in inside]
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
    parser.add_argument("--batch-tokens", type=int, default=Settings.batch_tokens, help="tokens of a batch (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=Settings.lr, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads, 0 for torch's choice (default: 0)")
    parser.add_argument("--save-minutes", type=float, default=5.0, help="between checkpoints (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint beside --out")
    return Settings(**vars(parser.parse_args(arguments)))


def main() -> None:
    """The command."""
    settings = parse()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    Trainer(settings).run()


if __name__ == "__main__":
    main()
