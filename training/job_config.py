"""What a fine-tuning job is: one frozen object that the creator writes, and server and clients agree on.

It is the body of `POST /v1/jobs` and the table `[job]` of a `split-train run` file. Everything random in a job follows
from `seed`, so the object and the clients' data decide the final weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from split_llama.config import BlockRange, Partition
from split_llama.errors import UsageError
from split_llama.lora import LoraConfig
from split_llama.settings import closest, nearest

Count = Annotated[int, Field(ge=1, lt=2**31)]
# As many sequences as the header of FORWARD may list.
Batch = Annotated[int, Field(ge=1, le=4096)]
# Micro-batches of all clients together that may be under way.
MAX_UNDER_WAY = 4096
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False, strict=False)]
Fraction = Annotated[float, Field(ge=0, lt=1, strict=False)]
Name = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[\w.-]+$")]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class LoraPart(_Part):
    """The adapters: rank, scale, where they sit (`segments`, `target_modules`), and dropout on their input."""

    r: Count = 8
    alpha: Positive = 16.0
    dropout: Fraction = 0.0
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    segments: tuple[Literal["A", "B", "C"], ...] = ("A", "B", "C")
    rslora: bool = False

    @property
    def config(self) -> LoraConfig:
        """The same as every module of the project knows it. Raises `UsageError`."""
        return LoraConfig(self.r, self.alpha, self.dropout, self.target_modules, self.rslora)


class OptimizerPart(_Part):
    """AdamW (torch) and its schedule (transformers' names). `max_grad_norm` clips the whole gradient of a step."""

    lr: Positive = 1e-4
    weight_decay: NotNegative = 0.0
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: Positive = 1e-8
    schedule: Literal["constant", "constant_with_warmup", "linear", "cosine", "inverse_sqrt"] = "linear"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    max_grad_norm: Positive | None = 1.0


class JobConfig(_Part):
    """One fine-tuning job.

    `steps` are optimizer steps of a weight set, each of `accumulate` micro-batches of `batch_size` samples per
    contributing client. `strategy` may be a plug-in, `module:Class`. `shared` says which adapters all parties train
    together; what is not shared stays with its client. `deadline_seconds` leaves out clients that are that much later
    than the first one of a step; without it everybody is waited for, `rejoin_seconds` at most once a client is gone.
    `compute_dtype` is that of the frozen base on the server; adapters and sums are float32. `recompute` keeps only
    inputs on the server until the backward, `gradient_checkpointing` does the same at the clients. `codec` and
    `gradient_codec` are those of states and of gradients on the wire. `max_micros` is how many micro-batches a client
    may have under way, so that the wire and both computers work at the same time.
    """

    name: Name = "job"
    strategy: str = "client-batch"
    clients: Annotated[int, Field(ge=1, le=1024)] = 2
    partition: str = "1,1"
    shared: Literal["B", "A,B,C"] = "B"
    steps: Count = 100
    batch_size: Batch = 8
    accumulate: Annotated[int, Field(ge=1, lt=2**16)] = 1
    max_length: Count = 512
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    lora: LoraPart = LoraPart()
    optimizer: OptimizerPart = OptimizerPart()
    turn_steps: Count = 1
    average_every: Count = 10
    weighting: Literal["tokens", "paper-sum"] = "tokens"
    aggregation: Literal["mean", "median", "trimmed-mean"] = "mean"
    trim: Annotated[float, Field(gt=0, lt=0.5, strict=False)] = 0.2
    client_max_grad_norm: Positive | None = None
    deadline_seconds: Positive | None = None
    rejoin_seconds: Positive = 60.0
    checkpoint_every: Count = 50
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    recompute: bool = False
    gradient_checkpointing: bool = False
    codec: Literal["fp32", "bf16", "fp16", "int8"] = "fp16"
    gradient_codec: Literal["fp32", "bf16", "fp16", "int8"] = "bf16"
    max_micros: Annotated[int, Field(ge=1, le=64)] = 4

    @field_validator("strategy")
    @classmethod
    def _known_strategy(cls, value: str) -> str:
        known = ("sequential", "client-batch", "server-hierarchical")
        if value not in known and ":" not in value:
            raise ValueError(f"expected module:Class or one of {', '.join(known)}{nearest(value, known)}")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        try:
            Partition.parse(self.partition)
            _ = self.lora.config
        except UsageError as error:
            raise ValueError(error.message) from None
        if not self.lora.segments:
            raise ValueError("lora.segments names no segment: nothing would be trained")
        if self.clients * self.max_micros > MAX_UNDER_WAY:
            raise ValueError(f"clients x max_micros may be {MAX_UNDER_WAY}; use a smaller max_micros")
        if self.weighting == "paper-sum" and self.aggregation != "mean":
            raise ValueError("weighting paper-sum goes with aggregation mean only")
        return self

    @classmethod
    def parse(cls, raw: Mapping[str, Any], where: str = "the job") -> JobConfig:
        """Read a JSON or TOML table. Raises `UsageError` that names each wrong field."""
        try:
            # Through JSON's rules: a list is a tuple, and nothing else is bent.
            return cls.model_validate_json(json.dumps(dict(raw)))
        except ValidationError as error:
            faults = error.errors(include_url=False, include_context=False)
            listed = "; ".join(f"{'.'.join(map(str, fault['loc'])) or 'job'}: {_say(fault)}" for fault in faults[:5])
            raise UsageError(f"{where}: {listed}") from None
        except TypeError as error:
            raise UsageError(f"{where}: expected what JSON can say: {error}") from None

    def blocks(self, num_hidden_layers: int) -> BlockRange:
        """The blocks of B in a model of so many. Raises `UsageError` where nothing is left."""
        return Partition.parse(self.partition).segment_b(num_hidden_layers)

    @property
    def shares_all(self) -> bool:
        """Say whether A's and C's adapters are shared too."""
        return self.shared == "A,B,C"


def _say(fault: Any) -> str:
    if fault["type"] != "extra_forbidden":
        return str(fault["msg"]).removeprefix("Value error, ")
    parts: dict[str, type[_Part]] = {"lora.": LoraPart, "optimizer.": OptimizerPart, "": JobConfig}
    known = [f"{prefix}{name}" for prefix, part in parts.items() for name in part.model_fields]
    return f"there is no such key{closest('.'.join(map(str, fault['loc'])), known)}"
