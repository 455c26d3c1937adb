"""The whole model in one process, by transformers and PEFT: what the split is compared with."""

from __future__ import annotations

import asyncio
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from split_llama.checkpoint import Checkpoint
from split_llama.load import parse_device, parse_dtype
from training.evaluate.backend import Progress
from training.evaluate.feeds import Feeds, Likelihood, first_target
from training.tasks.examples import Sample

T = TypeVar("T")

# Who logs while PEFT looks for what it may use.
_NOISY = ("torchao", "torch.utils._pytree")


class CentralModel:
    """A model of transformers, with or without a PEFT adapter; `batch` sequences pass at once, padded."""

    def __init__(self, model: Any, end_ids: Sequence[int], batch: int) -> None:
        self._model = model
        self._end_ids = tuple(end_ids)
        self._batch = batch
        self._device = next(model.parameters()).device

    @classmethod
    def load(
        cls, folder: Path, adapter: Path | None = None, *, dtype: str = "auto", device: str = "auto", batch: int = 16
    ) -> CentralModel:
        """Load a model folder, and a PEFT folder over it; "auto" is float32 on a CPU, else the checkpoint's type.

        Raises `UsageError` for an unknown type or device.
        """
        from transformers import AutoModelForCausalLM

        place = parse_device(device)
        kept = "float32" if dtype == "auto" and place.type == "cpu" else dtype
        ends = Checkpoint.open(folder).generation_config().eos_token_ids
        with _peft_quiet():
            model: Any = AutoModelForCausalLM.from_pretrained(
                str(folder), dtype=kept if kept == "auto" else parse_dtype(kept)
            )
            if adapter is not None:
                from peft import PeftModel

                model = PeftModel.from_pretrained(model, str(adapter))
        return cls(model.to(place).eval(), ends, batch)

    async def likelihoods(self, groups: Sequence[Sequence[Sample]], progress: Progress) -> list[list[float]]:
        """Give each sample's log-probability."""
        return await asyncio.to_thread(self._likelihoods, groups, progress)

    async def continuations(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, progress: Progress
    ) -> list[list[int]]:
        """Give each prompt's greedy continuation."""
        return await asyncio.to_thread(self._continuations, prompts, max_new_tokens, progress)

    def _likelihoods(self, groups: Sequence[Sequence[Sample]], progress: Progress) -> list[list[float]]:
        plans = [Feeds.of(group) for group in groups]
        totals = [[0.0] * len(group) for group in groups]
        feeds = [(at, feed) for at, plan in enumerate(plans) for feed in range(len(plan.sequences))]
        # Neighbours in length share a batch; a group's feeds are about equally long, so it is done about at once.
        feeds.sort(key=lambda key: -len(plans[key[0]].sequences[key[1]]))
        left = [len(plan.sequences) for plan in plans]
        for batch in _pieces(feeds, self._batch):
            sequences = [plans[at].sequences[feed] for at, feed in batch]
            wanted = [plans[at].wants(groups[at], feed) for at, feed in batch]
            for (at, feed), found in zip(batch, self._score(sequences, wanted), strict=True):
                covered = (index for index, owner in enumerate(plans[at].feed_of) if owner == feed)
                for index, total in zip(covered, found, strict=True):
                    totals[at][index] = total
                left[at] -= 1
            progress(left.count(0))
        return totals

    @torch.inference_mode()
    def _score(self, sequences: Sequence[Sequence[int]], wanted: Sequence[Sequence[Sample]]) -> list[list[float]]:
        width = max(map(len, sequences))
        ids = torch.tensor([[*each, *[0] * (width - len(each))] for each in sequences], device=self._device)
        mask = torch.tensor([[1] * len(each) + [0] * (width - len(each)) for each in sequences], device=self._device)
        first = min(first_target(sample) for samples in wanted for sample in samples) - 1
        # Logits are the widest tensor there is: none before the first row that is looked at.
        keep = max(1, width - max(0, first))
        logits = self._model(input_ids=ids, attention_mask=mask, logits_to_keep=keep, use_cache=False).logits
        totals = []
        for row, (each, samples) in enumerate(zip(sequences, wanted, strict=True)):
            likelihood = Likelihood(samples)
            likelihood.see(width - keep, logits[row, : len(each) - (width - keep)])
            totals.append(likelihood.totals)
        return totals

    def _continuations(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, progress: Progress
    ) -> list[list[int]]:
        answers: list[list[int]] = [[] for _ in prompts]
        done = 0
        for batch in _pieces(sorted(range(len(prompts)), key=lambda index: -len(prompts[index])), self._batch):
            rows = self._greedy([prompts[index] for index in batch], max_new_tokens)
            for index, row in zip(batch, rows, strict=True):
                answers[index] = self._until_end(row)
            done += len(batch)
            progress(done)
        return answers

    @torch.inference_mode()
    def _greedy(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        """Decode prompts padded on the left. A loop of our own: `generate` would bring the checkpoint's own
        sampling settings in."""
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(each)) + list(each) for each in prompts], device=self._device)
        mask = torch.tensor([[0] * (width - len(each)) + [1] * len(each) for each in prompts], device=self._device)
        ends = torch.tensor(self._end_ids, dtype=torch.int64, device=self._device)
        ended = torch.zeros(len(prompts), dtype=torch.bool, device=self._device)
        new: list[Tensor] = []
        cache = None
        while len(new) < max_new_tokens and not bool(ended.all()):
            positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
            output = self._model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = output.past_key_values
            new.append(output.logits[:, -1].float().argmax(-1))
            ended |= torch.isin(new[-1], ends)
            ids = new[-1][:, None]
            mask = torch.cat((mask, torch.ones_like(ids)), dim=1)
        rows: list[list[int]] = torch.stack(new, dim=1).tolist() if new else [[] for _ in prompts]
        return rows

    def _until_end(self, row: Sequence[int]) -> list[int]:
        stop = next((at for at, token in enumerate(row) if token in self._end_ids), len(row))
        return list(row[:stop])


def _pieces(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


@contextmanager
def _peft_quiet() -> Iterator[None]:
    """Hide what PEFT, transformers and torchao report of each other: no user can do anything about it."""
    from transformers.utils import logging as transformers_logging

    loggers = {name: logging.getLogger(name) for name in _NOISY}
    levels = {name: logger.level for name, logger in loggers.items()}
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    for logger in loggers.values():
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for name, level in levels.items():
            loggers[name].setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
