"""What a user can set on the edge; `split_llama.settings` merges the layers. No heavy imports: `--help` runs this."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edge_client.plugins import check_name
from split_llama.config import QUANTIZATIONS
from split_llama.errors import UsageError
from split_llama.settings import setting

SECTION = "edge"


def _between(low: float, high: float, what: str) -> Callable[[float], None]:
    def check(value: float) -> None:
        if not low <= value <= high or math.isinf(value):
            raise ValueError(f"expected {what}")

    return check


def _above_zero(value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError("expected seconds above 0")


def _noise(text: str) -> None:
    if ":" in text:
        check_name(text)
        return
    number = text.removeprefix("mean-abs=")
    try:
        value = float(number)
    except ValueError:
        raise ValueError("expected a standard deviation such as 0.02, mean-abs=0.02, or MODULE:CLASS") from None
    _between(0, math.inf, "a noise of 0 or more")(value)


def _clip(text: str) -> None:
    if text == "auto":
        return
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise ValueError("expected auto or a norm above 0")


def _partition(text: str) -> None:
    if text == "auto":
        return
    parts = text.split(",")
    if len(parts) != 2 or not all(part.strip().isdigit() for part in parts):
        raise ValueError("expected two block counts p,q such as 1,1, or auto")


@dataclass(frozen=True, slots=True)
class AdapterChoice:
    """An adapter by the name that the server has for it; `folder` holds A's and C's part, or else the server does."""

    name: str
    folder: Path | None

    @classmethod
    def parse(cls, text: str) -> AdapterChoice:
        """Read `NAME` or `NAME=DIR`. Raises `ValueError`."""
        name, equals, folder = text.partition("=")
        if not name or (equals and not folder):
            raise ValueError("expected an adapter's name, or NAME=DIR")
        return cls(name, Path(folder).expanduser() if equals else None)

    def __str__(self) -> str:
        return self.name if self.folder is None else f"{self.name}={self.folder}"


def _speculate(text: str) -> None:
    if text not in ("auto", "off") and not (text.isascii() and text.isdigit() and 1 <= int(text) <= 63):
        raise ValueError("expected auto, off, or a number of guesses from 1 to 63")


@dataclass(frozen=True)
class EdgeSettings:
    """Everything that shapes the edge's work; one object per process, never mutated."""

    server: str | None = setting(None, "address of the split-server, such as http://127.0.0.1:8700", metavar="URL")
    model: str | None = setting(
        None, "own copy of the model: a folder, a hub id or demo; without it the edge's part is fetched from the server"
    )
    api_key: str | None = setting(None, "key for the server", secret=True, metavar="KEY")
    transport: str = setting("auto", "how frames travel", choices=("auto", "ws", "http"))
    ca_certs: Path | None = setting(
        None, "trust the certificate authorities in this PEM file, and no others, for https", metavar="FILE"
    )
    fallback_server: tuple[str, ...] = setting(
        (), "another server of the same model, for when the first is lost; may be given several times", metavar="URL"
    )
    request_timeout: float | None = setting(
        None,
        "seconds an answer may take in all, waiting included; default: as long as it takes",
        check=_above_zero,
        metavar="S",
    )
    reconnect_seconds: float = setting(
        60.0, "how long to wait for a lost or busy server", check=_between(0, 1e9, "seconds, 0 or more"), metavar="S"
    )
    partition: str = setting(
        "1,1",
        "blocks that stay here: first p and last q; auto takes what edge-client plan chose, or chooses once",
        check=_partition,
        metavar="P,Q|auto",
    )
    noise: str = setting(
        "mean-abs=0.02",
        "noise on every value sent: standard deviation, or mean-abs=X for its mean size; 0 switches clipping off too; "
        "or an own MODULE:CLASS",
        check=_noise,
        metavar="SIGMA",
    )
    clip: str = setting("auto", "norm limit of every row sent: auto calibrates it", check=_clip, metavar="NORM")
    codec: str = setting("fp16", "how values travel", choices=("int8", "fp16", "bf16", "fp32"))
    speculate: str = setting(
        "auto",
        "guess tokens ahead and check many in one round trip: auto does as much as pays, N always guesses up to N; "
        "the text stays the same",
        check=_speculate,
        metavar="auto|off|N",
    )
    drafter: str = setting(
        "auto",
        "where guesses come from: lookup (repetitions in the text), head or FILE.safetensors (see train-drafter), "
        "auto (both), or an own MODULE:CLASS",
    )
    learn_from_chats: bool = setting(
        False, "keep the token ids of prompts and answers in the state folder, for train-drafter --chats"
    )
    adapter: str | None = setting(
        None,
        "LoRA adapter of the server's to use; with DIR the part that runs here comes from this PEFT folder",
        check=AdapterChoice.parse,
        metavar="NAME[=DIR]",
    )
    allow_embedding_states: bool = setting(False, "allow p = 0, which sends bare token embeddings")
    accept_new_weights: bool = setting(False, "trust the server's weights although they changed since first use")
    device: str = setting("auto", "where the edge computes: auto, cpu or cuda[:N]")
    dtype: str = setting(
        "auto", "type of the weights: float32, bfloat16 or float16; auto is float32 on a CPU, the server's on CUDA"
    )
    quantization: str = setting(
        "none", "store the weights in fewer bits: int8; on CUDA also fp8 and int4", choices=QUANTIZATIONS
    )
    threads: int | None = setting(
        None,
        "CPU threads; default: half of the logical cores",
        check=_between(1, 4096, "1 thread or more"),
        metavar="N",
    )
    max_new_tokens: int = setting(
        256, "tokens to generate at most", check=_between(1, 2**31, "1 token or more"), metavar="N"
    )
    temperature: float | None = setting(
        None, "0 is greedy; default: what the model's generation_config.json says, else 0", metavar="T"
    )
    top_p: float | None = setting(None, "sample from the likeliest tokens with this total probability", metavar="P")
    top_k: int | None = setting(None, "sample from the K likeliest tokens; 0 switches it off", metavar="K")
    min_p: float | None = setting(None, "drop tokens below this share of the likeliest one", metavar="P")
    repetition_penalty: float | None = setting(None, "above 1 makes repetition less likely", metavar="X")
    seed: int | None = setting(None, "seed of the sampling; default: random", metavar="N")
    stop: tuple[str, ...] = setting((), "text that ends the answer; may be given several times", metavar="TEXT")
    cache_dir: Path | None = setting(None, "folder of fetched weights; default: the user's own")
    state_dir: Path | None = setting(None, "folder of the edge secret and pins; default: the user's own")

    def caches(self) -> Path:
        """Folder of what can be fetched again."""
        if self.cache_dir is not None:
            return self.cache_dir
        import platformdirs

        return platformdirs.user_cache_path("fl-llama")

    def states(self) -> Path:
        """Folder of what cannot: the edge secret and the pins."""
        if self.state_dir is not None:
            return self.state_dir
        import platformdirs

        return platformdirs.user_state_path("fl-llama")

    def adapter_choice(self) -> AdapterChoice | None:
        """Give the adapter asked for, if any."""
        return None if self.adapter is None else AdapterChoice.parse(self.adapter)

    def server_url(self) -> str:
        """Give the server's address. Raises `UsageError` when none is set."""
        if not self.server:
            raise UsageError("which server? Give --server URL, for example --server http://127.0.0.1:8700")
        return self.server

    def check(self) -> None:
        """Raise `UsageError` for what can be told without asking anybody."""
        self.server_url()
        if self.partition.split(",")[0].strip() == "0" and not self.allow_embedding_states:
            raise UsageError(
                "with p = 0 the server gets bare token embeddings, from which anybody reads the text back; "
                "keep at least one block (--partition 1,1), or say --allow-embedding-states"
            )
