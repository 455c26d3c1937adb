"""How much an attack recovers, and the controls that say whether the figure means anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edge_client.plugins import make_plugin
from split_llama.errors import UsageError
from split_llama.settings import nearest
from training.attacks.nearest import NearestEmbedding
from training.attacks.public import Attack, PublicModel
from training.attacks.vocabulary import VocabularyMatching

BUILT_IN: Mapping[str, type[NearestEmbedding] | type[VocabularyMatching]] = {
    "nearest-embedding": NearestEmbedding,
    "vocabulary-matching": VocabularyMatching,
}


@dataclass(frozen=True, slots=True)
class Recovery:
    """How many of `total` tokens were recovered; a public first one (BOS) counts on neither side."""

    right: int = 0
    total: int = 0

    @property
    def share(self) -> float:
        """The share recovered, 0 of nothing."""
        return self.right / self.total if self.total else 0.0

    def plus(self, other: Recovery) -> Recovery:
        """Give both together."""
        return Recovery(self.right + other.right, self.total + other.total)


@dataclass(frozen=True, slots=True)
class Intercepted:
    """One text, and the rows `[n, d]` that the server was sent for it (float32, decoded)."""

    ids: tuple[int, ...]
    rows: Tensor


def check_attack(name: str) -> None:
    """Raise `UsageError` for a name that is neither built in nor `module:Class`."""
    if ":" not in name and name not in BUILT_IN:
        raise UsageError(
            f"there is no attack {name!r}; expected module:Class or one of {', '.join(BUILT_IN)}"
            f"{nearest(name, BUILT_IN)}"
        )


def make_attack(name: str, public: PublicModel) -> Attack:
    """Make an attack by its name: built in, or a plug-in `module:Class`. Raises `UsageError`."""
    check_attack(name)
    if name in BUILT_IN:
        return BUILT_IN[name](public)
    made: Attack = make_plugin("attack", name, "recover", public)
    return made


def run_attack(name: str, attack: Attack, seen: Sequence[Intercepted], bos: int | None) -> Recovery:
    """Let `attack` loose on every text. Raises `UsageError` where a plug-in fails or gives no ids."""
    total = Recovery()
    for text in seen:
        try:
            found = list(attack.recover(text.rows.clone()))
        except Exception as error:
            raise UsageError(f"the attack {name!r} failed: {type(error).__name__}: {error}") from error
        if len(found) != len(text.ids) or not all(type(token) is int for token in found):
            raise UsageError(f"the attack {name!r} must give {len(text.ids)} token ids, one per row; got {found!r:.80}")
        begin = int(text.ids[0] == bos)
        pairs = list(zip(found, text.ids, strict=True))[begin:]
        total = total.plus(Recovery(sum(guess == token for guess, token in pairs), len(pairs)))
    return total


def shuffled(seen: Sequence[Intercepted], bos: int | None, seed: int = 0) -> list[Intercepted]:
    """Give the same texts with their rows in a random order, a public first one left in place: the control that no
    attack may pass."""
    generator = torch.Generator().manual_seed(seed)
    mixed = []
    for text in seen:
        begin = int(text.ids[0] == bos)
        order = torch.randperm(len(text.ids) - begin, generator=generator) + begin
        mixed.append(Intercepted(text.ids, torch.cat((text.rows[:begin], text.rows[order]))))
    return mixed
