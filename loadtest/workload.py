"""What the clients ask for, as a pure function of the seed and the request's number.

A request is the same whichever client and process sends it and whenever: runs of one seed differ in timing only.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

MOST_TOKENS = 1 << 20


@dataclass(frozen=True, slots=True)
class Lengths:
    """A distribution of lengths in tokens. `longest` is the most that `draw` gives."""

    kind: str
    low: int
    longest: int
    median: float = 0.0
    sigma: float = 0.0

    def draw(self, source: random.Random) -> int:
        """Draw a length of at least 1."""
        if self.kind == "lognormal":
            return max(1, min(self.longest, round(source.lognormvariate(math.log(self.median), self.sigma))))
        return source.randint(self.low, self.longest)


def parse_lengths(text: str) -> Lengths:
    """Read `N`, `fixed:N`, `uniform:A-B` or `lognormal:MEDIAN,SIGMA,MAX`. Raises `ValueError`.

    Lognormal is what prompts of real users look like: many short ones and a long tail. SIGMA is the standard deviation
    of the logarithm; MAX cuts the tail, so that a run can be checked against the context beforehand.
    """
    kind, _, rest = text.partition(":") if ":" in text else ("fixed", ":", text)
    try:
        match kind:
            case "fixed":
                return _checked(Lengths("fixed", int(rest), int(rest)))
            case "uniform":
                low, high = rest.split("-")
                return _checked(Lengths("uniform", int(low), int(high)))
            case "lognormal":
                median, sigma, longest = rest.split(",")
                return _checked(Lengths("lognormal", 1, int(longest), float(median), float(sigma)))
    except ValueError:
        pass
    raise ValueError(
        f"expected N, fixed:N, uniform:A-B or lognormal:MEDIAN,SIGMA,MAX with lengths from 1 to {MOST_TOKENS}"
    )


def _checked(lengths: Lengths) -> Lengths:
    shape = lengths.kind != "lognormal" or (1 <= lengths.median < math.inf and 0 <= lengths.sigma < 100)
    if not (1 <= lengths.low <= lengths.longest <= MOST_TOKENS and shape):
        raise ValueError
    return lengths


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What random prompts are made of: ids from 0 to `size` but for `special`; `bos` comes first where there is one."""

    size: int
    bos: int | None = None
    special: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class RequestSpec:
    """One request: the prompt's ids, how many tokens to generate at most, and the seed of the sampling."""

    index: int
    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    seed: int


class Workload:
    """Requests by number. Either `texts` (ids of prompts, taken in turn) or random prompts of `prompt_tokens`."""

    def __init__(
        self,
        seed: int,
        prompt_tokens: Lengths,
        max_new_tokens: Lengths,
        vocabulary: Vocabulary,
        texts: Sequence[Sequence[int]] = (),
    ) -> None:
        self._seed = seed
        self._prompt_tokens = prompt_tokens
        self._max_new_tokens = max_new_tokens
        self._vocabulary = vocabulary
        self._texts = texts

    def request(self, index: int) -> RequestSpec:
        """Give request `index`; negative numbers are for warm-up."""
        # Seeded with text: it is hashed with SHA-512, so neighbours have nothing in common.
        source = random.Random(f"fl-llama loadtest {self._seed} {index}")
        length = self._prompt_tokens.draw(source)
        answer = self._max_new_tokens.draw(source)
        seed = source.getrandbits(63)
        texts = self._texts
        prompt = tuple(texts[index % len(texts)]) if texts else self._random_prompt(source, length)
        return RequestSpec(index, prompt, answer, seed)

    def _random_prompt(self, source: random.Random, length: int) -> tuple[int, ...]:
        vocabulary = self._vocabulary
        ids = [] if vocabulary.bos is None else [vocabulary.bos]
        while len(ids) < length:
            token = source.randrange(vocabulary.size)
            if token not in vocabulary.special:
                ids.append(token)
        return tuple(ids)


def split_evenly(total: int, parts: int) -> list[int]:
    """Split `total` into `parts` whole numbers that differ by 1 at most, the larger ones first."""
    base, extra = divmod(total, parts)
    return [base + (part < extra) for part in range(parts)]
