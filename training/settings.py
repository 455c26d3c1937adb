"""What a user can set for fine-tuning at the clients (section `train`). No heavy imports: `--help` runs this.

What decides the result (strategy, ranks, steps, learning rate, codecs ...) is no setting: it is the job's, the same for
all parties (`training.job_config`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

from edge_client.settings import EdgeSettings
from split_llama.settings import setting

SECTION = "train"
_SHARED_WITH_EDGE = {field.name: field for field in fields(EdgeSettings)}


def _like_edge(name: str) -> Callable[[object], object] | None:
    """Give the check that the edge has for the setting of this name."""
    check: Callable[[object], object] | None = _SHARED_WITH_EDGE[name].metadata["check"]
    return check


def _not_negative(value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError("expected a number of at least 0")


def _above_zero(value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError("expected a number above 0")


@dataclass(frozen=True)
class TrainSettings:
    """How one client takes part; one object per process, never mutated."""

    server: str | None = setting(None, "address of the split-server, such as http://127.0.0.1:8700", metavar="URL")
    model: str | None = setting(
        None, "own copy of the model: a folder, a hub id or demo; without it the client's part comes from the server"
    )
    api_key: str | None = setting(None, "key for the server", secret=True, metavar="KEY")
    job_key: str | None = setting(None, "the job's key, which its creator was given", secret=True, metavar="KEY")
    transport: str = setting("auto", "how frames travel", choices=("auto", "ws", "http"))
    ca_certs: Path | None = setting(
        None, "trust the certificate authorities in this PEM file, and no others, for https", metavar="FILE"
    )
    reconnect_seconds: float = setting(
        300.0, "how long to wait for a lost or busy server", check=_not_negative, metavar="S"
    )
    noise: str = setting(
        "mean-abs=0.02",
        "noise on every value sent forward: standard deviation, or mean-abs=X for its mean size; 0 switches clipping "
        "off too; or an own MODULE:CLASS",
        check=_like_edge("noise"),
        metavar="SIGMA",
    )
    clip: str = setting(
        "auto", "norm limit of every row sent: auto calibrates it", check=_like_edge("clip"), metavar="NORM"
    )
    gradient_noise: float = setting(
        0.0, "standard deviation of noise on every gradient value sent", check=_not_negative, metavar="SIGMA"
    )
    gradient_clip: float | None = setting(
        None, "norm limit of every gradient row sent", check=_above_zero, metavar="NORM"
    )
    allow_embedding_states: bool = setting(False, "allow p = 0, which sends bare token embeddings")
    accept_new_weights: bool = setting(False, "trust the server's weights although they changed since first use")
    strategy_plugin: tuple[str, ...] = setting(
        (),
        "code that a job may name as its strategy; may be given several times",
        metavar="MODULE:CLASS",
    )
    device: str = setting("auto", "where the client computes: auto, cpu or cuda[:N]")
    dtype: str = setting("float32", "type of the frozen weights: float32 or bfloat16; adapters are float32")
    threads: int | None = setting(
        None, "CPU threads; default: half of the logical cores", check=_like_edge("threads"), metavar="N"
    )
    tensorboard: bool = setting(True, "write curves for TensorBoard")
    cache_dir: Path | None = setting(None, "folder of fetched weights; default: the user's own")
    state_dir: Path | None = setting(
        None, "folder of the secret behind the noise, and of pins; default: the user's own"
    )

    def edge(self, partition: str, codec: str) -> EdgeSettings:
        """Give the settings of the connection and of the weights, for what the job says."""
        same = {name: getattr(self, name) for name in (field.name for field in fields(self)) if name in _TAKEN_OVER}
        return EdgeSettings(partition=partition, codec=codec, speculate="off", **same)


_TAKEN_OVER = frozenset(_SHARED_WITH_EDGE) & {field.name for field in fields(TrainSettings)}
