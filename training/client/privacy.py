"""What a client does to values before they leave: noise on states as at inference, noise and clipping on gradients.

Noise on states is a function of the secret, the prefix and the weights that made the state (`split_llama.noise`): while
A's adapter changes from step to step every row is a new release, and is counted as one. With an adapter that adds
nothing yet the states are those of inference, and so is their noise.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from edge_client.plugins import make_plugin
from split_llama.lora import Adapter, LoraConfig
from split_llama.noise import (
    Accountant,
    NoiseChain,
    NoiseScope,
    NoiseSpec,
    PrefixNoise,
    RowNoise,
    apply,
    apply_plugin,
    clip_rows,
    count_exact_rows,
    normal_rows,
)
from training.compute.batch import Batch


@dataclass(frozen=True, slots=True, eq=False)
class Released:
    """Rows as they may leave, float32 `[N, d]` on the CPU, and the way of their gradient back to the states."""

    rows: Tensor
    states: Tensor | None = None

    def backward(self, grad: Tensor) -> Tensor:
        """Give dL/dstates `[N, d]` from dL/drows: through the clipping, past the noise."""
        if self.states is None:
            return grad
        (back,) = torch.autograd.grad(self.rows, self.states, grad.to(self.rows))
        return back


@dataclass(frozen=True, slots=True)
class GradientSpec:
    """Noise (standard deviation) and clipping (norm of a row) of gradients; both off by default."""

    sigma: float = 0.0
    clip: float | None = None


class StateNoise:
    """Noise on A's outputs. `scope` names everything but the adapter, which comes with each call."""

    def __init__(self, spec: NoiseSpec, scope: NoiseScope, secret: bytes, bos_token_id: int | None) -> None:
        self.spec = spec
        self.accountant = Accountant()
        self._scope = scope
        self._secret = secret
        self._bos = bos_token_id
        self._own: RowNoise | None = make_plugin("noise", spec.plugin, "rows") if spec.plugin else None

    def release(self, states: Tensor, batch: Batch, adapter: str) -> Released:
        """Give `states` `[N, d]` as they may be sent, and count them; `adapter` is the digest of A's adapter or "".

        A sequence's leading BOS is the same for every text and goes as it is.
        """
        states = states.detach().float().cpu()
        if not self.spec.is_on:
            return Released(states)
        noise = PrefixNoise(self._secret, dataclasses.replace(self._scope, adapter=adapter))
        with torch.inference_mode(False), torch.set_grad_enabled(self.spec.clip is not None):
            leaf = states.clone().requires_grad_(self.spec.clip is not None)
            lengths = list(batch.ragged.lengths)
            parts = zip(torch.split(leaf, lengths), torch.split(batch.token_ids, lengths), strict=True)
            rows = [self._sequence(noise, states, tokens.tolist()) for states, tokens in parts]
            return Released(torch.cat(rows), leaf if leaf.requires_grad else None)

    def _sequence(self, noise: PrefixNoise, states: Tensor, tokens: list[int]) -> Tensor:
        chain = NoiseChain(noise)
        chain.append(tokens)
        digests = chain.digests(0)
        public = count_exact_rows(tokens, 0, self._bos)
        self.accountant.charge(digests[public:])
        if self._own is not None:
            return apply_plugin(self._own, self.spec.plugin, states, digests, public)
        return apply(self.spec, states, noise.unit_rows(digests), public)


class GradientNoise:
    """Clipping and noise on gradients. The noise follows from the secret, the place in the job and the gradient itself.

    So a step that is repeated after a restart sends the same bytes, and no two gradients share their noise.
    """

    def __init__(self, spec: GradientSpec, secret: bytes, job: str) -> None:
        self.spec = spec
        self._key = hmac.digest(secret, f"fl-llama gradient noise {job}".encode(), "sha256")

    def release(self, grad: Tensor, step: int, micro: int) -> Tensor:
        """Give a gradient `[N, d]` as it may be sent: float32 on the CPU."""
        grad = grad.detach().float().cpu()
        if self.spec.clip is not None:
            grad = clip_rows(grad, self.spec.clip)
        if not self.spec.sigma:
            return grad
        fingerprint = hashlib.sha256(grad.contiguous().numpy().data).digest()
        scope = f"{step} {micro} {self.spec.sigma!r} {self.spec.clip!r}".encode()
        root = hmac.digest(self._key, fingerprint + scope, "sha256")
        digests = [hashlib.sha256(root + row.to_bytes(8, "little")).digest() for row in range(len(grad))]
        return grad + self.spec.sigma * torch.from_numpy(normal_rows(digests, grad.shape[1]))


def adapter_digest(lora: LoraConfig, weights: Mapping[str, Tensor]) -> str:
    """Name the adapter in A for the noise: "" for one that changes nothing, as at the beginning."""
    if not any(bool(weight.any()) for name, weight in weights.items() if name.endswith("lora_B.weight")):
        return ""
    return Adapter(lora, weights).digest()
