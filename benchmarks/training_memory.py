"""Memory of split fine-tuning: M sets of adapters beside M copies of the base, and activations beside their limit.

    python -m benchmarks.training_memory [sets] [activations]

sets         processes of their own load the blocks of B of a model of 134M parameters (float32, partition 1,1) and make
             M weight sets (r 8 on q, k, v, o, with AdamW's moments after a step), or load B M times: resident memory,
             and the bytes of all tensors. Then M groups of 64 rows go once there and back in one pass.
activations  a server whose `--extension-memory` is less and less than what 4 clients with 2 micro-batches of 4 samples
             each would have it keep: its largest resident memory over what it had after a small job, and the speed
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import MODEL_134M, record
from benchmarks.training_common import MODEL_16M, Job, prepared_model, run_job, training_server
from split_llama.checkpoint import Checkpoint
from split_llama.config import Partition
from split_llama.load import load_segment, set_up_cpu
from split_llama.lora import LoraConfig, init_lora
from training.compute.lora import Group, leaves_of, take_gradients
from training.compute.optimizer import AdapterOptimizer
from training.compute.tape import Trunk, finish
from training.job_config import JobConfig, OptimizerPart

SETS = (1, 2, 4, 8)
LORA = LoraConfig(8, 16.0)
ROWS = 64
MIB = 2**20
LIMITS_GIB = (2.0, 0.125, 0.0625, 0.03125)


def memory_of(pid: int | str, name: str = "VmRSS") -> int:
    """Give a process' resident memory in bytes, or with "VmHWM" the most that it ever had."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{name}:"))) * 1024


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, each storage once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def loaded(model: Path, sets: int, copies: int) -> dict[str, int]:
    """In a process of its own: load B `copies` times, make `sets` weight sets; say what that took."""
    set_up_cpu(1)
    checkpoint = Checkpoint.open(model)
    span = Partition.parse("1,1").segment_b(checkpoint.config.num_hidden_layers)
    # What libraries take for themselves is counted before.
    AdapterOptimizer({"w": torch.ones(64, 64)}, OptimizerPart()).step({"w": torch.ones(64, 64)}, 1e-4)
    before = memory_of("self")
    segments = [load_segment(checkpoint, span, dtype=torch.float32, device=torch.device("cpu")) for _ in range(copies)]
    with_base = memory_of("self")
    optimizers = []
    for seed in range(sets):
        optimizer = AdapterOptimizer(init_lora(checkpoint.config, LORA, span, seed), OptimizerPart())
        optimizer.step({name: torch.zeros_like(weight) for name, weight in optimizer.weights.items()}, 1e-4)
        optimizers.append(optimizer)
    with_sets = memory_of("self")
    found = {
        "base_rss": with_base - before,
        "sets_rss": with_sets - with_base,
        "base_bytes": bytes_of(tensor for segment in segments for tensor in segment.state_dict().values()),
        "sets_bytes": sum(bytes_of(optimizer.tensors().values()) for optimizer in optimizers),
    }
    if copies == 1 and sets:
        one_pass(Trunk(segments[0], LORA), optimizers)
        found["after_pass_rss"] = memory_of("self") - with_sets
        found["peak_rss"] = memory_of("self", "VmHWM") - before
    return found


def one_pass(trunk: Trunk, optimizers: list[AdapterOptimizer]) -> None:
    """Take a group of rows for each set there and back, in one pass."""
    groups = [Group((ROWS,), leaves_of(optimizer.weights)) for optimizer in optimizers]
    rows = torch.randn(ROWS * len(groups), trunk.segment.config.hidden_size)
    tape = finish(trunk.forward(rows, groups, keep=True))
    finish(tape.backward(torch.ones_like(tape.output)))
    for group in groups:
        take_gradients(group.weights)


def in_a_process(model: Path, sets: int, copies: int) -> dict[str, int]:
    """Run `loaded` in a new process."""
    command = [sys.executable, "-m", "benchmarks.training_memory", "--loaded", str(model), str(sets), str(copies)]
    found: dict[str, int] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return found


def sets(options: argparse.Namespace) -> dict[str, Any]:
    """Measure M sets over one base, and M copies of it."""
    rows = []
    with prepared_model(MODEL_134M) as model:
        for count in SETS:
            one, copies = in_a_process(model, count, 1), in_a_process(model, count, count)
            rows.append({"clients": count, "one_base": one, "copies": copies})
            print(rows[-1], flush=True)
    return {"rows": rows}


# -- activations


class Watch:
    """Asks a job for its activation bytes again and again, in a thread."""

    def __init__(self, job: Job) -> None:
        self.most = 0
        self._job = job
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        while not self._ended.wait(0.05):
            self.most = max(self.most, int(self._job.status()["activation_bytes"]))

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        """Look for a block."""
        self._thread.start()
        try:
            yield
        finally:
            self._ended.set()
            self._thread.join()


def activations(options: argparse.Namespace) -> dict[str, Any]:
    """Run the same job under smaller and smaller limits, and once with `recompute`."""
    rows = []
    settings = [*((limit, False) for limit in LIMITS_GIB), (LIMITS_GIB[0], True)]
    with prepared_model(MODEL_16M) as model:
        for limit, recompute in settings:
            rows.append({"limit_bytes": int(limit * 2**30), "recompute": recompute} | limited(model, limit, recompute))
            print({key: round(value, 3) for key, value in rows[-1].items()}, flush=True)
    return {"rows": rows}


def limited(model: Path, limit: float, recompute: bool) -> Mapping[str, float]:
    """Run a job under a limit, after a small one for what is loaded once; give the server's memory and speed."""
    with training_server(model, "--extension-memory", str(limit)) as (url, pid):
        run_job(url, url, model, memory_job(clients=1, batch_size=1, accumulate=1), ROWS)
        # From here on the most that it has is counted anew.
        Path(f"/proc/{pid}/clear_refs").write_text("5")
        before = memory_of(pid)
        config = memory_job(recompute=recompute)
        with tempfile.TemporaryDirectory(prefix="fl-llama-clients-") as temporary:
            job, folder = Job(url, config), Path(temporary) / "out"
            watch = Watch(job)
            with watch.looking(), job.clients(url, model, folder, ROWS) as processes:
                codes = [process.wait() for process in processes]
            if any(codes):
                raise RuntimeError(f"clients ended with {codes}")
            seconds = job.finished(folder).seconds(config.average_every)
        timed = (config.steps - config.average_every) * config.clients * config.batch_size * config.accumulate
        return {
            "before_rss": before,
            "peak_rss": memory_of(pid, "VmHWM") - before,
            "activation_bytes": watch.most,
            "seconds_per_sample": seconds / timed,
        }


def memory_job(**changes: Any) -> JobConfig:
    """Give a job that has several micro-batches of each client under way."""
    base = {"strategy": "server-hierarchical", "clients": 4, "steps": 4, "average_every": 1}
    return JobConfig.parse(base | {"batch_size": 4, "accumulate": 2, "max_micros": 2} | changes)


SECTIONS = {"sets": sets, "activations": activations}


def main() -> None:
    """Run the sections asked for; each is recorded by itself."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []])
    parser.add_argument("--loaded", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.loaded:
        folder, count, copies = options.loaded
        print(json.dumps(loaded(Path(folder), int(count), int(copies))))
        return
    for name in options.sections or SECTIONS:
        record(f"training_memory-{name}", SECTIONS[name](options))


if __name__ == "__main__":
    main()
