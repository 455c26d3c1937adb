"""What `generate` takes: the names and meanings of transformers, as far as they go here."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from edge_client.sampling import SamplingParams
from split_llama.errors import UsageError
from split_llama.generation_config import GenerationDefaults
from split_llama.settings import nearest

# What transformers takes where neither the caller nor the checkpoint says it.
USUAL_TOP_K = 50


class GenerateKeywords(TypedDict, total=False):
    """Keywords of `SplitModelForCausalLM.generate` besides the ids, their mask and the streamer."""

    max_new_tokens: int | None
    max_length: int | None
    do_sample: bool | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    num_return_sequences: int
    eos_token_id: int | Sequence[int] | None
    pad_token_id: int | None
    stop_strings: str | Sequence[str] | None
    return_dict_in_generate: bool
    output_scores: bool
    output_logits: bool
    output_hidden_states: bool
    seed: int | None


@dataclass(frozen=True, slots=True)
class GenerateOptions:
    """The keywords with everything filled in."""

    sampling: SamplingParams
    max_new_tokens: int
    sequences: int
    eos: tuple[int, ...]
    pad: int
    stop: tuple[str, ...]
    as_object: bool
    scores: bool
    logits: bool
    hidden_states: bool

    @property
    def samples(self) -> bool:
        """Whether anything is drawn."""
        return self.sampling.temperature > 0


def check_keywords(function: str, given: Sequence[str], known: Sequence[str]) -> None:
    """Raise `TypeError` for a keyword that is none."""
    for name in given:
        if name not in known:
            raise TypeError(f"{function}() has no keyword {name!r}{nearest(name, known)}")


def read_options(
    keywords: GenerateKeywords, defaults: GenerationDefaults, *, pad: int | None, width: int, usual_new_tokens: int
) -> GenerateOptions:
    """Fill in the defaults. `width` is the length of the padded prompts. Raises `UsageError`."""
    eos = end_tokens(keywords, defaults)
    stop = keywords.get("stop_strings") or ()
    count = keywords.get("num_return_sequences", 1)
    sampling = _sampling(keywords, defaults)
    if count < 1:
        raise UsageError(f"num_return_sequences must be 1 or more, got {count}")
    if count > 1 and not sampling.temperature:
        raise UsageError("num_return_sequences above 1 needs do_sample=True: greedy answers are all the same")
    return GenerateOptions(
        sampling=sampling,
        max_new_tokens=_new_tokens(keywords, width, usual_new_tokens),
        sequences=count,
        eos=eos,
        pad=pad_token(keywords, eos, pad),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        as_object=keywords.get("return_dict_in_generate", False),
        scores=keywords.get("output_scores", False),
        logits=keywords.get("output_logits", False),
        hidden_states=keywords.get("output_hidden_states", False),
    )


def end_tokens(keywords: GenerateKeywords, defaults: GenerationDefaults) -> tuple[int, ...]:
    """Give the tokens that end an answer: the checkpoint's, or those given; `eos_token_id=None` means none."""
    if "eos_token_id" not in keywords:
        return defaults.eos_token_ids
    given = keywords["eos_token_id"]
    return () if given is None else (given,) if isinstance(given, int) else tuple(given)


def pad_token(keywords: GenerateKeywords, eos: tuple[int, ...], pad: int | None) -> int:
    """Give the token that fills rows up: the one given, the tokenizer's, an end token, or 0."""
    given = keywords.get("pad_token_id")
    return next((token for token in (given, pad, *eos) if token is not None), 0)


def _new_tokens(keywords: GenerateKeywords, width: int, usual: int) -> int:
    asked, longest = keywords.get("max_new_tokens"), keywords.get("max_length")
    if asked is None and longest is not None:
        asked = longest - width
        if asked < 1:
            raise UsageError(f"max_length is {longest}, and the prompt has {width} tokens already")
    count = usual if asked is None else asked
    if count < 1:
        raise UsageError(f"max_new_tokens must be 1 or more, got {count}")
    return count


def _sampling(keywords: GenerateKeywords, defaults: GenerationDefaults) -> SamplingParams:
    penalty = _first(keywords.get("repetition_penalty"), defaults.repetition_penalty, 1.0)
    asked = keywords.get("do_sample")
    if not (defaults.do_sample if asked is None else asked):
        ignored = [name for name in ("temperature", "top_p", "top_k", "min_p") if keywords.get(name) is not None]
        if ignored:
            warnings.warn(f"{', '.join(ignored)} without do_sample=True has no effect", UserWarning, stacklevel=5)
        return SamplingParams(repetition_penalty=penalty)
    return SamplingParams(
        temperature=_first(keywords.get("temperature"), defaults.temperature, 1.0),
        top_p=_first(keywords.get("top_p"), defaults.top_p, 1.0),
        top_k=int(_first(keywords.get("top_k"), defaults.top_k, USUAL_TOP_K)),
        min_p=_first(keywords.get("min_p"), defaults.min_p, 0.0),
        repetition_penalty=penalty,
        seed=keywords.get("seed"),
    )


def _first(*values: Any) -> float:
    return float(next(value for value in values if value is not None))
