"""What split fine-tuning learns: strategies against centralized training, noise, MultiRC, and codecs on the wire.

    python -m benchmarks.training_quality [learning noise multirc codecs] [--work DIR] [--one-process]

Each run is `split-train run` with a server process and a process for each client; the adapters it leaves are scored on
held-out questions. `--one-process` runs the same maths without server and wire. What is in the work folder is not
run again, so the command may be interrupted.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import record
from benchmarks.training_quality_central import generated_accuracy, run_central
from benchmarks.training_quality_local import run_local
from benchmarks.training_quality_scores import Parts, score
from benchmarks.training_quality_setup import CENTRAL, STRATEGIES, WORK, Setup
from benchmarks.training_quality_split import run_split

UNEVEN = "shards:2"
# The paper's, and for the demo model, whose states are a thousand times that, some that are felt.
PAPER_NOISE = ("0", "mean-abs=0.02", "mean-abs=0.05", "mean-abs=0.1")
FELT_NOISE = ("mean-abs=2", "mean-abs=10")
CENTRALLY, PROCESSES, ONE_PROCESS = "transformers+PEFT", "processes", "one process"
CODECS = ("fp32", "bf16", "fp16", "int8")


def learning() -> list[Setup]:
    """Centralized three times, every strategy with 2, 4 and 8 clients, iid and not; and with private A and C."""
    central = [Setup(CENTRAL, seed=seed) for seed in range(3)]
    shared = [Setup(s, clients, deal) for deal in ("iid", UNEVEN) for clients in (2, 4, 8) for s in STRATEGIES]
    private = [Setup(s, 4, deal, "B") for deal in ("iid", UNEVEN) for s in STRATEGIES]
    return [*central, *shared, *private]


def noise() -> list[Setup]:
    """The paper's noise axis, on both tasks."""
    demo = [Setup("client-batch", 2, p=p, noise=size) for size in PAPER_NOISE for p in (1, 2, 3)]
    demo += [Setup("client-batch", 2, noise=size) for size in FELT_NOISE]
    texts = [Setup("client-batch", 2, task="passages", p=p, noise=size) for size in PAPER_NOISE for p in (1, 2, 3)]
    return [*demo, *texts]


def multirc() -> list[Setup]:
    """Loss curves on MultiRC: its verdicts, and its passages as text."""
    runs = [(CENTRAL, 1), *((strategy, 4) for strategy in STRATEGIES)]
    return [Setup(strategy, clients, task=task) for task in ("multirc", "passages") for strategy, clients in runs]


def codecs() -> list[Setup]:
    """States and gradients in every codec, the usual pair, and int8 in one direction alone."""
    pairs = [*((codec, codec) for codec in CODECS), ("fp16", "bf16"), ("int8", "fp32"), ("fp32", "int8")]
    return [Setup("client-batch", 2, codec=states, gradient_codec=gradients) for states, gradients in pairs]


PARTS: Mapping[str, Callable[[], list[Setup]]] = {
    "learning": learning,
    "noise": noise,
    "multirc": multirc,
    "codecs": codecs,
}


def measure(setup: Setup, work: Path, *, one_process: bool) -> dict[str, Any]:
    """Give a run's figures, from the work folder where they are there."""
    how = CENTRALLY if setup.strategy == CENTRAL else ONE_PROCESS if one_process else PROCESSES
    file = _file(setup, work, how)
    if file.is_file():
        known: dict[str, Any] = json.loads(file.read_text())
        return known
    file.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    found = {"setup": asdict(setup), "how": how} | _run(setup, how, file.with_suffix(""))
    found["seconds"] = round(time.monotonic() - began, 1)
    file.write_text(json.dumps(found))
    print(json.dumps({key: value for key, value in found.items() if key != "curve"}), flush=True)
    return found


def done(setup: Setup, work: Path) -> list[dict[str, Any]]:
    """Give a run's figures if it was made in any way, that with processes first."""
    files = [_file(setup, work, how) for how in (CENTRALLY, PROCESSES, ONE_PROCESS)]
    return [json.loads(file.read_text()) for file in files if file.is_file()][:1]


def _file(setup: Setup, work: Path, how: str) -> Path:
    return work / how.replace(" ", "-") / f"{setup.name}.json"


def _run(setup: Setup, how: str, folder: Path) -> dict[str, Any]:
    if setup.strategy == CENTRAL:
        curve, weights = run_central(setup)
        found = _scores(setup, curve, [weights])
        return found | ({"generated_accuracy": generated_accuracy(setup, weights)} if setup.task == "demo" else {})
    if how == ONE_PROCESS:
        curve, models, job = run_local(setup)
        return _scores(setup, curve, models) | {"row_bytes_up": job.bytes_up, "row_bytes_down": job.bytes_down}
    shutil.rmtree(folder, ignore_errors=True)
    result = run_split(setup, folder)
    sent = {"bytes_up": result.bytes_up, "bytes_down": result.bytes_down}
    return _scores(setup, result.curve, result.models) | sent


def _scores(setup: Setup, curve: Sequence[float], models: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
    """Score all models on the held-out samples, with the noise of training."""
    task = setup.of_task
    parts = Parts.load(task.checkpoint, setup.config)
    found = parts.noise(setup.noise, task.encoder.tokenizer.bos_token_id, {})
    scores = [score(parts, weights, found, task.held_out) for weights in models]
    return {
        "curve": [round(loss, 6) for loss in curve],
        "last_loss": fmean(curve[-20:]),
        "accuracy": fmean(one.accuracy for one in scores),
        "loss": fmean(one.loss for one in scores),
        "models": [asdict(one) for one in scores],
        "samples": setup.config.steps * task.batch,
    }


def untrained(setups: Sequence[Setup], work: Path) -> list[dict[str, Any]]:
    """Score the base model of each task, without adapters."""
    return [_untrained(setup, work) for setup in {setup.task: setup for setup in setups}.values()]


def _untrained(setup: Setup, work: Path) -> dict[str, Any]:
    file = work / f"untrained-{setup.task}.json"
    if not file.is_file():
        parts = Parts.load(setup.of_task.checkpoint, setup.config)
        clean = parts.noise("0", None, {})
        found = {"task": setup.task} | asdict(score(parts, {}, clean, setup.of_task.held_out))
        file.write_text(json.dumps(found))
    known: dict[str, Any] = json.loads(file.read_text())
    return known


def main() -> None:
    """Run and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument(
        "--work", type=Path, default=WORK, metavar="DIR", help="keeps what is done (default: %(default)s)"
    )
    parser.add_argument("--one-process", action="store_true", help="without server, wire and processes")
    parser.add_argument("--collect", action="store_true", help="run nothing: record what the work folder has")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for part in options.parts or PARTS:
        setups = PARTS[part]()
        if options.collect:
            rows = [row for setup in setups for row in done(setup, options.work)]
        else:
            rows = [measure(setup, options.work, one_process=options.one_process) for setup in setups]
        record(f"training_quality-{part}", {"untrained": untrained(setups, options.work), "rows": rows}, [part])


if __name__ == "__main__":
    main()
