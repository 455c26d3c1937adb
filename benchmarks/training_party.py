"""The processes behind the benchmarks of split fine-tuning; each is told what to do by JSON and its arguments.

    python -m benchmarks.training_party server TIMES ...   `split-server ... --extension training`, TIMES may be null
    python -m benchmarks.training_party client SPEC        `split-train client`
    python -m benchmarks.training_party parts SPEC         seconds of A, B and C, with one thread
    python -m benchmarks.training_party central SPEC       transformers + PEFT, the whole model, seconds per sample

With device times the blocks of B, or A, C and head, sleep for as long as a device would compute, and pass states and
gradients on as they came.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import spread
from benchmarks.training_common import TARGETS, ClientSpec, DeviceTimes, device_times
from split_llama.checkpoint import Checkpoint
from split_llama.config import BlockRange, Partition
from split_llama.layers import Segment
from split_llama.load import load_segment, set_up_cpu
from split_llama.lora import LoraConfig, init_lora
from training.compute.batch import Batch
from training.compute.ends import Ends, Loss
from training.compute.lora import DropoutKey, Group, leaves_of, take_gradients
from training.compute.optimizer import AdapterOptimizer
from training.compute.tape import Trunk, finish
from training.job_config import LoraPart, OptimizerPart

PARTITION = "1,1"
LORA = LoraConfig(8, 16.0)


# -- emulated devices


def sleep_until(end: float) -> None:
    """Sleep until a time of `perf_counter`, if that is to come."""
    time.sleep(max(0.0, end - time.perf_counter()))


class EmulatedTape:
    """A forward of an emulated device that waits for its backward."""

    def __init__(self, output: Tensor, blocks: int, seconds: float) -> None:
        self.output = output
        self.nbytes = output.nbytes
        self._blocks = blocks
        self._seconds = seconds

    def backward(self, grad: Tensor) -> Generator[None, None, Tensor]:
        """Take as long as the device; yield after every block."""
        yield from emulated(self._blocks, self._seconds)
        return grad


class EmulatedTrunk:
    """In the place of `Trunk`: a pass takes what `times` say, whatever this machine does."""

    def __init__(self, segment: Segment, lora: LoraConfig | None, times: DeviceTimes) -> None:
        self.segment = segment
        self.lora = lora
        self._times = times

    def forward(
        self, rows: Tensor, groups: Sequence[Group], *, keep: bool, span: BlockRange | None = None
    ) -> Generator[None, None, EmulatedTape]:
        """Take as long as the device; yield after every block."""
        blocks = len(span or self.segment.blocks)
        count = max(group.rows for group in groups) if self._times.apart else len(rows)
        yield from emulated(blocks, self._times.b_forward.of(count))
        return EmulatedTape(rows, blocks, self._times.b_backward.of(count))

    def block_bytes(self, groups: Sequence[Group], *, keep: bool) -> int:
        """Say what a real pass would hold."""
        return Trunk(self.segment, self.lora).block_bytes(groups, keep=keep)


def emulated(blocks: int, seconds: float) -> Generator[None, None, None]:
    """Sleep for each block's part of `seconds`; what is overslept is taken off the next one."""
    debt = 0.0
    for _ in range(blocks):
        begin = time.perf_counter()
        sleep_until(begin + seconds / blocks - debt)
        debt += time.perf_counter() - begin - seconds / blocks
        yield


class EmulatedEnds:
    """In the place of `Ends`: A and C take what `times` say. Losses are 1 per target token."""

    def __init__(self, ends: Ends, times: DeviceTimes) -> None:
        self.embedding, self.a, self.c, self.head = ends.embedding, ends.a, ends.c, ends.head
        self.first_weights = ends.first_weights
        self._times = times

    def forward_a(
        self, batch: Batch, weights: Mapping[str, Tensor], dropout: DropoutKey | None
    ) -> tuple[Tensor, EmulatedTape]:
        """Give embeddings."""
        end = time.perf_counter() + self._times.a_forward.of(batch.ragged.rows)
        rows = self.embedding(batch.token_ids).detach()
        sleep_until(end)
        return rows, EmulatedTape(rows, 1, self._times.a_backward.of(batch.ragged.rows))

    def loss(self, states: Tensor, batch: Batch, weights: Mapping[str, Tensor], dropout: DropoutKey | None) -> Loss:
        """Give a loss and a gradient of a plausible size."""
        end = time.perf_counter() + self._times.c.of(batch.ragged.rows)
        targets = batch.target_count
        grad = torch.full_like(states, 1e-3)
        sleep_until(end)
        return Loss(float(targets), targets, grad)

    def backward_a(self, tape: EmulatedTape, grad: Tensor) -> None:
        """Take as long as the device."""
        finish(tape.backward(grad))


# -- processes


def server(times: DeviceTimes | None, arguments: Sequence[str]) -> int:
    """Run `split-server`; with `times` its extension computes with emulated blocks."""
    from serving.cli import main as serve

    if times is not None:
        from training.server import extension

        def make_trunk(segment: Segment, lora: LoraConfig | None) -> EmulatedTrunk:
            return EmulatedTrunk(segment, lora, times)

        # What the entry point finds.
        made = functools.partial(extension.TrainingExtension, make_trunk=make_trunk)
        extension.TrainingExtension = made  # type: ignore[assignment,misc]
    return serve([*arguments, "--extension", "training"])


def client(spec: ClientSpec) -> int:
    """Take part in a job, as `split-train client` does."""
    from training.client import run
    from training.client.data import DataPart
    from training.client.jobs import JobKey
    from training.settings import TrainSettings

    home = Path(spec.out) / f"home-{spec.name}"
    settings = TrainSettings(
        server=spec.url,
        model=spec.model,
        noise=spec.noise,
        threads=1,
        tensorboard=False,
        cache_dir=home / "cache",
        state_dir=home / "state",
    )
    plan = run.ClientPlan(
        JobKey(spec.job, spec.key), spec.name, DataPart("pairs", Path(spec.data)), Path(spec.out), quiet=True
    )
    if spec.times is not None:
        prepare, times = run.prepare, spec.times

        def prepare_emulated(*given: Any) -> Any:
            prepared = prepare(*given)
            prepared.maths.ends = EmulatedEnds(prepared.maths.ends, times)  # type: ignore[assignment]
            return prepared

        run.prepare = prepare_emulated
    return run.run_client(settings, plan, lambda line: print(f"{spec.name}: {line}", file=sys.stderr))


# -- seconds of the parts


def timed(work: Callable[[], Any], into: dict[str, list[float]], name: str) -> Any:
    """Do something, and note how long it took."""
    begin = time.perf_counter()
    result = work()
    into.setdefault(name, []).append(time.perf_counter() - begin)
    return result


def parts(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Measure one client's A and C for `batch` samples, and B for those of each of `sizes` clients in one pass."""
    set_up_cpu(1)
    checkpoint = Checkpoint.open(Path(spec["model"]))
    ends = Ends.load(checkpoint, Partition.parse(PARTITION), LORA)
    span = Partition.parse(PARTITION).segment_b(checkpoint.config.num_hidden_layers)
    trunk = Trunk(load_segment(checkpoint, span, dtype=torch.float32, device=torch.device("cpu")), LORA)
    sets = [
        AdapterOptimizer(init_lora(checkpoint.config, LORA, span, seed), OptimizerPart())
        for seed in range(max(spec["sizes"]))
    ]
    mine = AdapterOptimizer(ends.first_weights(0), OptimizerPart())
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, checkpoint.config.vocab_size, (spec["batch"], spec["rows"]), generator=draw).tolist()
    batch = Batch.of(ids, [[-100] * (spec["rows"] - TARGETS) + row[-TARGETS:] for row in ids])
    found: dict[str, dict[str, list[float]]] = {str(size): {} for size in spec["sizes"]}
    rounds = 0
    end = time.perf_counter() + spec["seconds"]
    while time.perf_counter() < end or rounds < 4:
        for size in spec["sizes"]:
            one_round(found[str(size)] if rounds else {}, ends, trunk, sets[:size], mine, batch)
        rounds += 1
    return {size: {name: spread(values) for name, values in some.items()} for size, some in found.items()}


def one_round(
    found: dict[str, list[float]],
    ends: Ends,
    trunk: Trunk,
    sets: Sequence[AdapterOptimizer],
    mine: AdapterOptimizer,
    batch: Batch,
) -> None:
    """Go once there and back."""
    leaves = leaves_of(mine.weights)
    states, tape = timed(lambda: ends.forward_a(batch, leaves, None), found, "a_forward")
    groups = [Group(batch.ragged.lengths, leaves_of(one.weights)) for one in sets]
    many = torch.cat([states] * len(sets))
    passed = timed(lambda: finish(trunk.forward(many, groups, keep=True)), found, "b_forward")
    loss = timed(lambda: ends.loss(passed.output[: len(states)], batch, leaves, None), found, "c")
    grad = torch.cat([loss.grad] * len(sets))
    back = timed(lambda: finish(passed.backward(grad)), found, "b_backward")
    timed(lambda: ends.backward_a(tape, back[: len(states)]), found, "a_backward")
    gradients = [take_gradients(group.weights) for group in groups]
    timed(lambda: sets[0].step(gradients[0], 1e-6), found, "b_step")
    own = take_gradients(leaves)
    timed(lambda: mine.step(own, 1e-6), found, "ends_step")


def central(spec: Mapping[str, Any]) -> dict[str, float]:
    """Train the whole model with transformers and PEFT for some seconds; give seconds per step of `batch` samples."""
    import warnings

    import peft
    import transformers

    warnings.simplefilter("ignore")
    torch.set_num_threads(spec["threads"])
    base = transformers.AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32)
    part = LoraPart()
    config = peft.LoraConfig(
        r=part.r, lora_alpha=int(part.alpha), lora_dropout=0.0, target_modules=list(part.target_modules)
    )
    model = peft.get_peft_model(base, config)
    adam = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-4)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, base.config.vocab_size, (spec["batch"], spec["rows"]), generator=draw)
    labels = ids.clone()
    labels[:, : spec["rows"] - TARGETS] = -100
    taken: list[float] = []
    end = time.perf_counter() + spec["seconds"]
    while time.perf_counter() < end or len(taken) < 5:
        begin = time.perf_counter()
        model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(adam.param_groups[0]["params"], 1.0)
        adam.step()
        adam.zero_grad()
        taken.append(time.perf_counter() - begin)
    return spread(taken[1:])


def client_spec(text: str) -> ClientSpec:
    """Read what `ClientSpec.to_json` wrote."""
    raw = json.loads(text)
    return ClientSpec(**raw | {"times": device_times(raw["times"])})


def main() -> int:
    """Be one of the processes."""
    what, first, *rest = sys.argv[1:]
    if what == "server":
        return server(device_times(json.loads(first)), rest)
    if what == "client":
        return client(client_spec(first))
    print(json.dumps({"parts": parts, "central": central}[what](json.loads(first))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
