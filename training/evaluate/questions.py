"""A task as questions to a model: likelihoods of choices, of whole passages, or free answers; and their scores."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from edge_client.tokenizer import EdgeTokenizer
from split_llama.errors import UsageError
from training.evaluate.backend import Backend, Progress
from training.evaluate.feeds import first_target
from training.tasks.encoding import Encoder
from training.tasks.examples import AnyExample, Dialogue, Example, Passage, Sample, choices
from training.tasks.scores import perplexity, score

PERPLEXITY = "perplexity"


@dataclass(frozen=True)
class Result:
    """Scores by name, and the seconds that the answers took."""

    scores: dict[str, float]
    examples: int
    seconds: float

    @property
    def examples_per_second(self) -> float:
        """Speed over the whole task, many examples at once."""
        return self.examples / self.seconds if self.seconds else math.inf


@dataclass(frozen=True)
class Questions:
    """The same for every model of a table. `alternatives` has, per example, the samples of its choices, the windows of
    its passage, or nothing where the answer is free text: then `prompts` has what to continue."""

    task: str
    examples: tuple[AnyExample, ...]
    alternatives: tuple[tuple[Sample, ...], ...]
    prompts: tuple[tuple[int, ...], ...]
    tokenizer: EdgeTokenizer
    max_new_tokens: int
    left_out: int

    @classmethod
    def of(
        cls, task: str, examples: Iterable[AnyExample], encoder: Encoder, *, limit: int | None, max_new_tokens: int
    ) -> Questions:
        """Encode the first `limit` examples. One whose choice does not fit in the encoder's length is left out.

        Raises `UsageError` if none fits.
        """
        kept: list[tuple[AnyExample, tuple[Sample, ...], tuple[int, ...]]] = []
        left_out = 0
        for example in itertools.islice(examples, limit):
            samples = _alternatives(example, encoder)
            if samples is None:
                left_out += 1
                continue
            free = () if samples or isinstance(example, Passage) else encoder.prompt(example, max_new_tokens)
            kept.append((example, samples, tuple(free)))
        if not kept:
            raise UsageError(f"none of the {left_out} examples fits in {encoder.max_length} tokens: raise --max-length")
        asked, alternatives, prompts = zip(*kept, strict=True)
        return cls(task, asked, alternatives, prompts, encoder.tokenizer, max_new_tokens, left_out)

    @property
    def longest(self) -> int:
        """The most tokens that one sequence comes to, with its answer."""
        fed = (len(sample.token_ids) for samples in self.alternatives for sample in samples)
        answered = (len(prompt) + self.max_new_tokens for prompt in self.prompts if prompt)
        return max(itertools.chain(fed, answered))

    async def ask(self, model: Backend, progress: Progress) -> Result:
        """Put all questions to `model` and score its answers."""
        begin = time.perf_counter()
        closed = [index for index, samples in enumerate(self.alternatives) if samples]
        free = [index for index, samples in enumerate(self.alternatives) if not samples]
        found = await model.likelihoods([self.alternatives[index] for index in closed], progress)
        continued = await model.continuations(
            [self.prompts[index] for index in free],
            self.max_new_tokens,
            lambda done: progress(len(closed) + done),
        )
        seconds = time.perf_counter() - begin
        texts = dict(zip(free, map(self.tokenizer.decode, continued), strict=True))
        scores = self._scores(dict(zip(closed, found, strict=True)), texts)
        return Result(scores, len(self.examples), seconds)

    def texts(self, count: int, length: int) -> list[tuple[int, ...]]:
        """Give the first `length` ids of what the first `count` examples make a client send: prompts, or passages."""
        found: list[tuple[int, ...]] = []
        everything = zip(self.examples, self.alternatives, self.prompts, strict=True)
        for example, samples, prompt in itertools.islice(everything, count):
            if isinstance(example, Passage):
                found.append(samples[0].token_ids[:length])
            else:
                ids = samples[0].token_ids[: first_target(samples[0])] if samples else prompt
                found.append(ids[:length])
        return found

    def _scores(self, found: dict[int, Sequence[float]], texts: dict[int, str]) -> dict[str, float]:
        if all(isinstance(example, Passage) for example in self.examples):
            loss = -math.fsum(total for totals in found.values() for total in totals)
            targets = sum(sample.targets for samples in self.alternatives for sample in samples)
            return {PERPLEXITY: perplexity(loss, targets)}
        for index, totals in found.items():
            options = choices(self.examples[index])
            texts[index] = options[max(range(len(options)), key=lambda at: totals[at])]
        answered = [example for example in self.examples if isinstance(example, Example | Dialogue)]
        return score(self.task, answered, [texts[index] for index in range(len(answered))])


def _alternatives(example: AnyExample, encoder: Encoder) -> tuple[Sample, ...] | None:
    """Give what to compare for an example, nothing for a free answer, and `None` where something does not fit."""
    if isinstance(example, Passage):
        return tuple(encoder.samples(example)) or None
    made = []
    for option in choices(example):
        assert isinstance(example, Example), "only examples have choices"
        samples = encoder.samples(dataclasses.replace(example, answer=option))
        if not samples:
            return None
        made += samples
    return tuple(made)
