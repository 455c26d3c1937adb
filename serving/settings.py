"""The server's settings, one frozen object per process."""

from __future__ import annotations

import ipaddress
import math
from dataclasses import dataclass
from pathlib import Path

from split_llama.config import QUANTIZATIONS
from split_llama.errors import UsageError
from split_llama.settings import setting
from split_llama.transport.address import ServerAddress

SECTION = "server"
LOG_LEVELS = ("debug", "info", "warning", "error")
DTYPES = ("auto", "float32", "bfloat16", "float16", "fp32", "bf16", "fp16")
KV_DTYPES = (*DTYPES, "int8", "fp8")
ATTENTIONS = ("auto", "triton", "torch")
MIN_BATCHED_TOKENS = 4


def _positive(value: float) -> None:
    if value <= 0:
        raise ValueError("expected a number above 0")


def _not_negative(value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError("expected a number of at least 0")


def _fraction(value: float) -> None:
    if not 0 < value <= 1:
        raise ValueError("expected a fraction above 0 and at most 1")


def _port(value: int) -> None:
    if not 0 <= value < 65536:
        raise ValueError("expected a port between 0 and 65535 (0 takes any free one)")


def _batched_tokens(value: int) -> None:
    if value < MIN_BATCHED_TOKENS:
        raise ValueError(f"expected at least {MIN_BATCHED_TOKENS}")


@dataclass(frozen=True)
class ServerSettings:
    """What `split-server` can be told, by flag, environment or file."""

    model: str = setting("demo", "folder, hub id, or demo")
    host: str = setting("127.0.0.1", "address to listen at")
    port: int = setting(8700, "port to listen at; 0 takes any free one", check=_port)
    device: str = setting("auto", "auto, cpu or cuda[:N]")
    dtype: str = setting(
        "auto", "type of the weights; auto is float32 on a CPU and the checkpoint's on CUDA", choices=DTYPES
    )
    quantization: str = setting(
        "none", "store the weights in fewer bits: int8; on CUDA also fp8 and int4", choices=QUANTIZATIONS
    )
    allowed_partitions: str = setting("1,1", "the least p,q an edge may choose; [p, L-q) is hosted", metavar="P,Q")
    max_model_len: int | None = setting(None, "most positions of a session (default: the model's own)", check=_positive)
    max_num_seqs: int = setting(64, "most sessions in one pass", check=_positive)
    max_sessions: int = setting(256, "most sessions held at once", check=_positive)
    max_num_batched_tokens: int | None = setting(
        None, "most rows in one pass (default: 256 on a CPU, 2048 on CUDA)", check=_batched_tokens
    )
    gpu_memory_utilization: float | None = setting(
        None, "fraction of the free memory for the KV cache (default: 0.9 on CUDA, 0.4 on a CPU)", check=_fraction
    )
    kv_cache_dtype: str = setting(
        "auto", "type of the KV cache; auto is the compute type, int8 and fp8 have a scale per head", choices=KV_DTYPES
    )
    attention: str = setting(
        "auto",
        "how passes are computed: auto is triton (kernels and CUDA graphs) where they can run, else torch",
        choices=ATTENTIONS,
    )
    swap_space: float | None = setting(
        None,
        "host memory, in GiB, for the KV pages of idle sessions when pages run out (default: 4 on CUDA, 0 on a CPU)",
        check=_not_negative,
        metavar="GIB",
    )
    served_model_name: str | None = setting(None, "name under which the model is listed")
    lora_modules: tuple[str, ...] = setting(
        (), "hold a LoRA adapter, a PEFT folder, under a name; may be given several times", metavar="NAME=DIR"
    )
    api_key: str | None = setting(None, "a key that clients must send", secret=True)
    api_key_file: Path | None = setting(None, "file of keys made by `split-server keys create`")
    ssl_certfile: Path | None = setting(None, "certificate (PEM): serve https and wss")
    ssl_keyfile: Path | None = setting(None, "private key of the certificate (PEM)")
    ssl_ca_certs: Path | None = setting(None, "CA (PEM) that must have signed every client's certificate")
    root_path: str = setting("", "path prefix under which a reverse proxy serves this")
    log_level: str = setting("info", "how much to log", choices=LOG_LEVELS)
    threads: int | None = setting(
        None, "CPU threads of the model (default: half of the logical cores)", check=_positive
    )
    idle_seconds: float = setting(1800.0, "a session unused for so long is closed", check=_positive)
    grace_seconds: float = setting(120.0, "a session outlives its connection for so long", check=_positive)
    evict_seconds: float = setting(30.0, "pages of a session unused for so long may be taken", check=_positive)
    drain_seconds: float = setting(10.0, "at shutdown, queued steps are finished for so long", check=_positive)
    successor: str | None = setting(
        None, "at shutdown, send clients to this server: they bring their sessions along", metavar="URL"
    )

    extension: tuple[str, ...] = setting(
        (), "run this beside inference: training (split fine-tuning); may be given several times", metavar="NAME"
    )
    extension_dir: Path | None = setting(
        None, "folder where extensions keep their files, such as jobs and checkpoints (default: the user's own)"
    )
    extension_plugin: tuple[str, ...] = setting(
        (),
        "code that an extension's clients may ask for by its name, such as a strategy; may be given several times",
        metavar="MODULE:CLASS",
    )
    extension_memory: float = setting(
        2.0, "memory, in GiB, for what an extension has under way (activations)", check=_positive, metavar="GIB"
    )
    background_share: float = setting(
        0.5, "share of the time that extensions get while somebody generates", check=_fraction, metavar="FRACTION"
    )
    background_quantum: float = setting(
        20.0, "an extension computes so long at a time, less beside fast chats", check=_positive, metavar="MS"
    )

    def check(self) -> None:
        """Raise `UsageError` for settings that do not go together."""
        if self.successor is not None:
            ServerAddress.parse(self.successor)
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise UsageError("--ssl-certfile and --ssl-keyfile go together; only one of them was given")
        if self.ssl_ca_certs is not None and self.ssl_certfile is None:
            raise UsageError("--ssl-ca-certs needs --ssl-certfile and --ssl-keyfile")
        for path in (self.ssl_certfile, self.ssl_keyfile, self.ssl_ca_certs):
            if path is not None and not path.is_file():
                raise UsageError(f"there is no file {path}")
        if self.root_path and not self.root_path.startswith("/"):
            raise UsageError(f"--root-path must begin with a slash, got {self.root_path!r}")

    @property
    def extension_bytes(self) -> int:
        """The memory of extensions in bytes; 0 without any."""
        return int(self.extension_memory * 2**30) if self.extension else 0

    def extension_folder(self) -> Path:
        """Folder of what extensions keep."""
        if self.extension_dir is not None:
            return self.extension_dir
        import platformdirs

        return platformdirs.user_state_path("fl-llama") / "server"

    @property
    def is_loopback(self) -> bool:
        """Say whether only this machine can connect."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"
