"""Clip, calibrate, add: the noise on hidden states, one code path for inference and training.

Noise is obfuscation: it raises an attacker's cost, and `docs/privacy.md` measures by how much. It is a pseudorandom
function of the edge's secret, what produced the states (model, adapter, block range, numerics, noise setting) and the
token prefix. So the same prefix gives the same noise in every session and after every restart, and nobody can average
it away; a rejected draft has other noise because its prefix differs.

The setting is part of the function because two releases of one row with the same unit noise at two strengths (or with
two clip norms) are two equations that give the row exactly.

A user's own noise (`RowNoise`, a plug-in) takes the place of clipping and Gaussian noise, not of what is around them:
which rows are public, the chain of digests and the counting stay as they are.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from split_llama.accountant import Accountant as Accountant
from split_llama.config import BlockRange
from split_llama.errors import UsageError

SECRET_BYTES = 32
MEAN_ABS = "mean-abs="
DEFAULT_CLIP_QUANTILE = 0.99

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class NoiseSpec:
    """Strength of the noise: `sigma`, the standard deviation per coordinate, and `clip`, the largest norm of a row.

    `sigma` 0 is off, and then nothing is clipped either; unless `plugin` names a `RowNoise` as `module:Class`, which
    has neither. Raises `UsageError` on negative or non-finite values.
    """

    sigma: float
    clip: float | None = None
    plugin: str = ""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.sigma) and self.sigma >= 0):
            raise UsageError(f"noise must be a finite number of at least 0, {self.sigma} came")
        if self.clip is not None and not (math.isfinite(self.clip) and self.clip > 0):
            raise UsageError(f"the clip norm must be a finite number above 0, {self.clip} came")
        if self.plugin and (self.sigma or self.clip is not None):
            raise UsageError("a noise plug-in does its own clipping: give no clip norm with it")
        if not self.is_on and self.clip is not None:
            raise UsageError("noise 0 switches clipping off too: give no clip norm with it")

    @classmethod
    def parse(cls, text: str) -> NoiseSpec:
        """Read `--noise`: `0.02` is sigma; `mean-abs=0.02` is the mean absolute value, as arXiv 2505.15683 states it;
        `module:Class` is a plug-in.

        A Gaussian's mean absolute value is `sigma * sqrt(2 / pi)`. Raises `UsageError`.
        """
        if ":" in text:
            return cls(0.0, plugin=text.strip())
        number = text.strip().removeprefix(MEAN_ABS)
        try:
            value = float(number)
        except ValueError:
            raise UsageError(
                f"cannot read noise {text!r}: expected a number such as 0.02, mean-abs=0.02, or a plug-in module:Class"
            ) from None
        return cls(value * math.sqrt(math.pi / 2) if number != text.strip() else value)

    @property
    def is_on(self) -> bool:
        """Whether rows are changed at all."""
        return self.sigma > 0 or bool(self.plugin)

    def with_clip(self, limit: float) -> NoiseSpec:
        """Give this setting with a clip norm; unchanged when the noise is off or does its own clipping."""
        return replace(self, clip=limit) if self.sigma > 0 else self


@dataclass(frozen=True, slots=True)
class NoiseScope:
    """What noise belongs to besides the tokens: everything that decides the states a prefix gives, and the setting.

    `model` and `adapter` are digests of the weights the edge runs (an adapter's name would not do: other weights under
    the same name with the same noise would show their difference bare). `adapter` is empty without one. `numerics` says
    in what types and on what kind of device they run: other numerics give slightly other states.
    """

    model: str
    adapter: str
    blocks: BlockRange
    width: int
    spec: NoiseSpec
    numerics: str

    def encode(self) -> bytes:
        """Give one unambiguous byte string for the scope."""
        blocks = [self.blocks.start, self.blocks.stop]
        fields = [self.model, self.adapter, blocks, self.width, self.numerics, self.spec.sigma, self.spec.clip]
        if self.spec.plugin:
            fields.append(self.spec.plugin)
        return json.dumps(fields, separators=(",", ":")).encode()


class RowNoise(Protocol):
    """A user's own noise; `docs/python-api.md` says what it has to keep.

    Rows with one digest have one prefix, hence one state, and must get one result: whatever is random in it has to come
    from the digest (`normal_rows` does), never from a generator of its own.
    """

    def rows(self, states: torch.Tensor, digests: Sequence[bytes]) -> torch.Tensor:
        """Give what is sent for `states` `[n, d]` float32, finite and of that shape; `digests` has 32 bytes per row."""
        ...


class PrefixNoise:
    """Unit Gaussian noise by token prefix: a SHA-256 chain over the tokens, then SHAKE-256 and Box-Muller per row.

    The chain starts at HMAC-SHA256(secret, scope), so without the secret no link of it can be computed.
    """

    def __init__(self, secret: bytes, scope: NoiseScope) -> None:
        if len(secret) != SECRET_BYTES:
            raise UsageError(f"the edge secret must have {SECRET_BYTES} bytes, {len(secret)} came")
        self.width = scope.width
        self.root = hmac.digest(secret, scope.encode(), "sha256")

    def extend(self, digest: bytes, token: int) -> bytes:
        """Give the chain digest of a prefix with one more token."""
        return hashlib.sha256(digest + token.to_bytes(4, "little")).digest()

    def extend_tree(self, digest: bytes, tokens: Sequence[int], tree: Sequence[int]) -> list[bytes]:
        """Give the digests of a draft tree's nodes behind a prefix; `tree` holds ancestor bits as in a step."""
        digests: list[bytes] = []
        for node, (token, bits) in enumerate(zip(tokens, tree, strict=True)):
            parent = (bits ^ 1 << node).bit_length() - 1
            digests.append(self.extend(digest if parent < 0 else digests[parent], token))
        return digests

    def unit_rows(self, digests: Sequence[bytes]) -> Floats:
        """Give standard normal noise `[len(digests), width]` float32, row by row a function of its digest."""
        return normal_rows(digests, self.width)


def normal_rows(digests: Sequence[bytes], width: int) -> Floats:
    """Give standard normal numbers `[len(digests), width]` float32, row by row a function of its digest."""
    pairs = -(-width // 2)
    stream = b"".join(hashlib.shake_256(digest).digest(pairs * 16) for digest in digests)
    words = np.frombuffer(stream, "<u8").reshape(len(digests), 2, pairs)
    uniform = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
    # Box-Muller; 1 - u lies in (0, 1], where the logarithm is finite.
    radius = np.sqrt(-2 * np.log1p(-uniform[:, 0]))
    angle = 2 * np.pi * uniform[:, 1]
    normal = np.concatenate((radius * np.cos(angle), radius * np.sin(angle)), axis=1)
    return normal[:, :width].astype(np.float32)


class NoiseChain:
    """The chain of one session: a digest per position, so that it advances token by token and forks."""

    def __init__(self, noise: PrefixNoise) -> None:
        self._noise = noise
        self._digests: list[bytes] = []

    def __len__(self) -> int:
        return len(self._digests)

    @property
    def tip(self) -> bytes:
        """The digest of the whole prefix."""
        return self._digests[-1] if self._digests else self._noise.root

    def append(self, tokens: Iterable[int]) -> None:
        """Advance by `tokens`."""
        for token in tokens:
            self._digests.append(self._noise.extend(self.tip, token))

    def fork(self, at: int) -> NoiseChain:
        """Give a chain of its own for the first `at` tokens."""
        assert 0 <= at <= len(self._digests), f"fork at {at} of {len(self._digests)}"
        chain = NoiseChain(self._noise)
        chain._digests = self._digests[:at]
        return chain

    def branch(self, tokens: Sequence[int], tree: Sequence[int]) -> list[bytes]:
        """Give the digests of a draft tree's nodes behind the chain, which stays as it is."""
        return self._noise.extend_tree(self.tip, tokens, tree)

    def unit_rows(self, digests: Sequence[bytes]) -> Floats:
        """Give the unit noise `[n, width]` of the rows with these digests."""
        return self._noise.unit_rows(digests)

    def digests(self, first: int, stop: int | None = None) -> list[bytes]:
        """Give the digests of positions `[first, stop)`, as the accountant counts them."""
        return self._digests[first:stop]


def count_exact_rows(tokens: Sequence[int], first: int, bos_token_id: int | None) -> int:
    """Give how many leading rows of a step are constant, hence public: 1 for BOS at position 0, else 0.

    `tokens` are those of the step, `first` the position of the first one.
    Such a row is the same for every text. In LLaMA-2 it also carries activations some 10^4 times larger than others,
    which clipping would destroy.
    """
    return int(first == 0 and len(tokens) > 0 and tokens[0] == bos_token_id)


def calibrate_clip(norms: npt.ArrayLike, quantile: float = DEFAULT_CLIP_QUANTILE) -> float:
    """Give the clip norm: the `quantile` of `norms`, rounded up to one of them.

    The norms must be those of public vectors (states of the vocabulary or of a public text), never of the user's: a
    norm chosen from the user's text would itself tell something about it. Raises `UsageError` when they are unusable.
    """
    values = np.asarray(norms, dtype=np.float64).ravel()
    if values.size == 0 or not np.isfinite(values).all() or (values <= 0).any():
        raise UsageError("calibrating the clip norm needs finite norms above 0 of some public states")
    if not 0 < quantile <= 1:
        raise UsageError(f"the clip quantile must lie in (0, 1], {quantile} came")
    return float(np.quantile(values, quantile, method="higher"))


def clip_rows(states: torch.Tensor, limit: float) -> torch.Tensor:
    """Scale each row of `states` `[n, d]` whose norm exceeds `limit` down to it; gradients pass."""
    norms: torch.Tensor = torch.linalg.vector_norm(states, dim=-1, keepdim=True, dtype=torch.float32)
    return states * (limit / norms.clamp_min(limit))


def apply(
    spec: NoiseSpec, states: torch.Tensor, unit_noise: Floats | torch.Tensor, exact_rows: int = 0
) -> torch.Tensor:
    """Give `states` `[n, d]` clipped and noised as float32 `[n, d]`; the first `exact_rows` rows stay as they are.

    `unit_noise` `[n, d]` has a row for the exact ones too (it is not used). Gradients pass through to `states`.
    """
    assert not spec.plugin, "a plug-in's rows come from apply_plugin"
    states = states.float()
    if not spec.is_on:
        return states
    free = states[exact_rows:]
    if spec.clip is not None:
        free = clip_rows(free, spec.clip)
    noise = torch.as_tensor(unit_noise)[exact_rows:].to(free)
    return torch.cat((states[:exact_rows], free + spec.sigma * noise))


def apply_plugin(
    noise: RowNoise, name: str, states: torch.Tensor, digests: Sequence[bytes], exact_rows: int = 0
) -> torch.Tensor:
    """Give `states` `[n, d]` as a plug-in wants them sent; the first `exact_rows` rows stay as they are.

    Raises `UsageError` for anything but finite float32 rows of the same shape: nothing is sent then.
    """
    states = states.float()
    free = states[exact_rows:]
    if not len(free):
        return states
    # A copy: what the plug-in does to its argument is its own affair.
    try:
        rows = noise.rows(free.clone(), list(digests[exact_rows:]))
    except Exception as error:
        raise UsageError(f"the noise {name!r} failed, and nothing was sent: {type(error).__name__}: {error}") from error
    if not isinstance(rows, torch.Tensor) or rows.shape != free.shape or rows.dtype != torch.float32:
        got = f"{list(rows.shape)} {rows.dtype}" if isinstance(rows, torch.Tensor) else type(rows).__name__
        raise UsageError(
            f"the noise {name!r} gave {got}; float32 rows {list(free.shape)} were expected, and nothing was sent"
        )
    if not bool(torch.isfinite(rows).all()):
        raise UsageError(f"the noise {name!r} gave values that are not finite, and nothing was sent")
    return torch.cat((states[:exact_rows], rows.detach().to(states)))
