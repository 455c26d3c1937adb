"""What a checkpoint says about stopping and sampling: generation_config.json, else config.json's token ids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from split_llama.errors import CheckpointError
from split_llama.json_file import brief

_LARGE = 1e6


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """Defaults of the checkpoint; None where it says nothing. Sampling values count only with `do_sample`."""

    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    max_length: int | None = None
    max_new_tokens: int | None = None
    do_sample: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    @classmethod
    def from_hf(cls, generation: Mapping[str, Any], config: Mapping[str, Any]) -> GenerationDefaults:
        """Read a parsed generation_config.json; token ids it lacks come from the parsed config.json."""
        fields, fallback = _Fields(generation), _Fields(config)
        stop = fallback if generation.get("eos_token_id") is None else fields
        begin = fallback if generation.get("bos_token_id") is None else fields
        return cls(
            eos_token_ids=stop.token_ids("eos_token_id"),
            bos_token_id=begin.whole("bos_token_id"),
            max_length=fields.whole("max_length"),
            max_new_tokens=fields.whole("max_new_tokens"),
            do_sample=fields.switch("do_sample"),
            temperature=fields.number("temperature", 0, _LARGE),
            top_k=fields.whole("top_k"),
            top_p=fields.number("top_p", 0, 1),
            min_p=fields.number("min_p", 0, 1),
            repetition_penalty=fields.number("repetition_penalty", 0, _LARGE),
        )


@dataclass(frozen=True, slots=True)
class _Fields:
    """Typed reading of one parsed file."""

    raw: Mapping[str, Any]

    def whole(self, name: str) -> int | None:
        value = self.raw.get(name)
        if value is None or (type(value) is int and 0 <= value < 2**31):
            return value
        raise _malformed(name, value, "a whole number >= 0")

    def token_ids(self, name: str) -> tuple[int, ...]:
        value = self.raw.get(name)
        ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
        if all(type(item) is int and 0 <= item < 2**31 for item in ids):
            return tuple(dict.fromkeys(ids))
        raise _malformed(name, value, "a token id or a list of them")

    def number(self, name: str, low: float, high: float) -> float | None:
        value = self.raw.get(name)
        if value is None:
            return None
        if isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high:
            return float(value)
        raise _malformed(name, value, f"a number from {low:g} to {high:g}")

    def switch(self, name: str) -> bool:
        value = self.raw.get(name)
        if value is None or isinstance(value, bool):
            return bool(value)
        raise _malformed(name, value, "true or false")


def _malformed(name: str, value: object, wanted: str) -> CheckpointError:
    return CheckpointError(f"generation_config.json or config.json: {name} must be {wanted}, got {brief(value)}")
