"""Speed of split fine-tuning over an emulated link of 20 ms, beside the bounds that its parts and the data set.

    python -m benchmarks.training_speed [compute] [emulated] [overlap] [--rounds 2]

Server, link and every client are processes of their own with one CPU thread each; r 8, alpha 16 on q, k, v, o of all
blocks, partition 1,1, private A and C, fp16 states and bf16 gradients, no noise. Fewer samples than 1,000 are timed
and scaled. `benchmarks.training_bounds` derives the bounds.

compute   a random model of 16M parameters, samples of 64 tokens of which 16 are learned: sequential, client-batch and
          server-hierarchical with 2, 4 and 8 clients, 1 sample each (the paper's table), 4 clients with 4 samples
          each, and the whole model in transformers + PEFT with one thread
emulated  B and the clients' ends sleep for as long as devices would compute (see `FITS`), so that this machine's two
          cores bound nothing
overlap   8 micro-batches a step, with 1 and with 4 of them under way
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.common import record, spread
from benchmarks.training_bounds import Parts, step_bounds, window_bounds
from benchmarks.training_common import (
    MODEL_16M,
    MODEL_THIN,
    DeviceTimes,
    Finished,
    Seconds,
    ask_party,
    prepared_model,
    run_job,
    training_server,
)
from loadtest.proxy_process import proxy_process
from training.job_config import JobConfig

TRIP_MS = 20
ROWS = 64
STRATEGIES = ("sequential", "client-batch", "server-hierarchical")
CLIENTS = (2, 4, 8)
SHOWN = 1000
PARTS_SECONDS = 1.5
# Steps that are not timed; own sets are averaged after them, and so all clients begin together.
WARM = {"sequential": 8, "client-batch": 3, "server-hierarchical": 4}
TIMED = {"sequential": 40, "client-batch": 12, "server-hierarchical": 12}


def _seconds(fixed: float, sample: float) -> Seconds:
    """Half of what a pass takes there and back, from its constant part and its part per sample."""
    return Seconds(fixed / 2, sample / 2 / ROWS)


# The paper's table (1,000 samples, batch 1): the whole model by itself takes 0.382 s a sample, 1/33 of it for each of
# 32 blocks and for the head, so B's 30 blocks take 0.347 s and A, C and head 0.035 s. A round of client-batch takes
# 1.260, 2.169 and 3.909 s with 2, 4 and 8 clients: 0.384 + 0.441 M (least squares). Of these 0.441 s a client's own
# part, which the released code does one client after the other, is that of sequential without B: 0.689 - 0.347 =
# 0.342 s. What is left, 0.099 s, is the most that a further sample can have cost in B's pass, and 0.248 s of 0.347 s
# then do not depend on the samples. The least is what its arithmetic takes: 4 * 6.1e9 * 300 flop (300 tokens of
# ReCoRD, base frozen) at 200 TFLOP/s, 0.036 s.
_A = Seconds(0.006, 0.0)
_C = Seconds(0.023, 0.0)
FITS: Mapping[str, DeviceTimes] = {
    "most per row": DeviceTimes(_seconds(0.248, 0.099), _seconds(0.248, 0.099), _A, _C, _A),
    "least per row": DeviceTimes(_seconds(0.311, 0.036), _seconds(0.311, 0.036), _A, _C, _A),
    # The paper's hierarchical mode gives every client a server of its own.
    "a device per client": DeviceTimes(_seconds(0.248, 0.099), _seconds(0.248, 0.099), _A, _C, _A, apart=True),
}


def job_config(strategy: str, clients: int, **changes: Any) -> JobConfig:
    """Give a job that is timed from `WARM` on."""
    base = {
        "name": "speed",
        "strategy": strategy,
        "clients": clients,
        "steps": WARM[strategy] + TIMED[strategy],
        "batch_size": 1,
        "average_every": WARM[strategy],
        "checkpoint_every": 1000,
    }
    return JobConfig.parse(base | changes)


def samples_per_step(config: JobConfig) -> int:
    """Samples that make up a step of all who take part in it."""
    return config.batch_size * config.accumulate * (1 if config.strategy == "sequential" else config.clients)


def judged(config: JobConfig, finished: Finished, bounds: Mapping[str, float]) -> dict[str, Any]:
    """Say what a job took, per 1,000 samples, and how near that is to its bound."""
    warm = WARM[config.strategy]
    per_step = finished.seconds(warm) / (config.steps - warm)
    scale = SHOWN / samples_per_step(config)
    what, bound = max(bounds.items(), key=lambda item: item[1])
    return {
        "seconds": per_step * scale,
        "bound": bound * scale,
        "bound_by": what,
        "of_bound": bound / per_step,
        **finished.bytes_per_sample(warm),
    }


def summed_up(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Give medians with their spread of what several rounds found."""
    numbers = {key: spread([one[key] for one in rounds]) for key, value in rounds[0].items() if key != "bound_by"}
    return numbers | {"bound_by": rounds[-1]["bound_by"]}


def show(name: str, found: Mapping[str, Any]) -> None:
    """Print a line of figures."""
    shown = {key: round(value, 3) if isinstance(value, float) else value for key, value in found.items()}
    print(f"{name}: {shown}", flush=True)


# -- with computing


def measured_parts(model: Path, batch: int, clients: int) -> Parts:
    """Measure A, B and C by themselves, with one thread; B with micro-batches of 1, 2 ... `clients` in a pass."""
    sizes = [size for size in (1, *CLIENTS) if size <= clients]
    spec = {"model": str(model), "batch": batch, "rows": ROWS, "sizes": sizes, "seconds": PARTS_SECONDS}
    raw = ask_party("parts", json.dumps(spec))
    return Parts.of({int(size): {name: each["median"] for name, each in some.items()} for size, some in raw.items()})


def between(before: Parts, after: Parts) -> Parts:
    """Give the mean of what was measured before and after a run: the machine's speed drifts."""
    b = {size: (seconds + after.b[size]) / 2 for size, seconds in before.b.items()}
    ends = ((getattr(before, name) + getattr(after, name)) / 2 for name in ("a_forward", "c", "a_backward"))
    return Parts(*ends, b)


def settings_of_table() -> list[tuple[str, int, int]]:
    """Strategy, clients and batch size of every line."""
    return [(strategy, clients, 1) for strategy in STRATEGIES for clients in CLIENTS] + [
        (strategy, 4, 4) for strategy in STRATEGIES
    ]


def compute(options: argparse.Namespace) -> dict[str, Any]:
    """Measure all strategies, in alternating rounds; the parts before and after each run."""
    rounds: dict[str, list[dict[str, Any]]] = {}
    measured: dict[str, list[Any]] = {}
    cores = os.cpu_count() or 1
    with (
        prepared_model(MODEL_16M) as model,
        training_server(model) as (server, _),
        proxy_process(server, "--rtt", str(TRIP_MS)) as url,
    ):
        for _ in range(options.rounds):
            for batch in (1, 4):
                spec = {"model": str(model), "batch": batch, "rows": ROWS, "threads": 1, "seconds": 4}
                taken = ask_party("central", json.dumps(spec))["median"] * SHOWN / batch
                rounds.setdefault(f"centralized, batch {batch}", []).append({"seconds": taken})
                show(f"centralized, batch {batch}", {"seconds": taken})
            for strategy, clients, batch in settings_of_table():
                config = job_config(strategy, clients, batch_size=batch)
                before = measured_parts(model, batch, clients)
                finished = run_job(server, url, model, config, ROWS)
                parts = between(before, measured_parts(model, batch, clients))
                bounds = step_bounds(strategy, clients, parts, TRIP_MS / 1000, cores)
                found = judged(config, finished, bounds)
                name = f"{strategy}, {clients} clients, batch {batch}"
                rounds.setdefault(name, []).append(found)
                measured.setdefault(name, []).append(asdict(parts))
                show(name, found)
    lines = {name: summed_up(found) for name, found in rounds.items() if "bound" in found[0]}
    central = {name: {"seconds": spread([one["seconds"] for one in found])} for name, found in rounds.items()}
    return {"lines": {name: lines.get(name, central[name]) for name in rounds}, "parts": measured}


# -- with emulated devices


def emulated_parts(times: DeviceTimes, clients: int) -> Parts:
    """Say what the parts take by `times`."""

    def b(rows: int) -> float:
        return times.b_forward.of(rows) + times.b_backward.of(rows)

    return Parts(
        times.a_forward.of(ROWS),
        times.c.of(ROWS),
        times.a_backward.of(ROWS),
        {size: b(ROWS if times.apart else size * ROWS) for size in (1, *CLIENTS) if size <= clients},
    )


def emulated(options: argparse.Namespace) -> dict[str, Any]:
    """Measure all strategies with 8 clients, and with fewer where the paper has figures."""
    rounds: dict[str, list[dict[str, Any]]] = {}
    with prepared_model(MODEL_THIN) as model:
        for _ in range(options.rounds):
            for fit, times in FITS.items():
                with training_server(model, times=times) as (server, _):
                    _emulated_round(fit, times, server, model, rounds)
    lines = {name: summed_up(found) for name, found in rounds.items()}
    for name, line in lines.items():
        fit = name.partition(":")[0]
        base = lines[f"{'most per row' if FITS[fit].apart else fit}: sequential, 8 clients"]["seconds"]["median"]
        line["speed_up"] = base / line["seconds"]["median"]
    return {"lines": lines, "fits": {name: asdict(times) for name, times in FITS.items()}}


def _emulated_round(
    fit: str, times: DeviceTimes, server: str, model: Path, rounds: dict[str, list[dict[str, Any]]]
) -> None:
    settings = [] if times.apart else [("sequential", 8), ("client-batch", 8)]
    settings += [("server-hierarchical", clients) for clients in (CLIENTS if times.apart else (8,))]
    if fit == "least per row":
        settings += [(strategy, clients) for strategy in STRATEGIES[1:] for clients in (2, 4)]
    with proxy_process(server, "--rtt", str(TRIP_MS)) as url:
        for strategy, clients in settings:
            config = job_config(strategy, clients, steps=WARM[strategy] + TIMED[strategy] * 2 // 3)
            bounds = step_bounds(strategy, clients, emulated_parts(times, clients), TRIP_MS / 1000, 1e9)
            found = judged(config, run_job(server, url, model, config, ROWS, times), bounds)
            name = f"{fit}: {strategy}, {clients} clients"
            rounds.setdefault(name, []).append(found)
            show(name, found)


# -- what overlap gains


def overlap(options: argparse.Namespace) -> dict[str, Any]:
    """Measure windows of 1 and 4 with one client and with two, computing and emulated."""
    rounds: dict[str, list[dict[str, Any]]] = {}
    fit = FITS["least per row"]
    # A tenth of the paper's times: there the round trip matters.
    quick = DeviceTimes(
        *(
            Seconds(each.fixed / 10, each.row / 10)
            for each in (fit.b_forward, fit.b_backward, fit.a_forward, fit.c, fit.a_backward)
        )
    )
    for kind, geometry, times in (("computing", MODEL_16M, None), ("emulated", MODEL_THIN, quick)):
        with (
            prepared_model(geometry) as model,
            training_server(model, times=times) as (server, _),
            proxy_process(server, "--rtt", str(TRIP_MS)) as url,
        ):
            for _ in range(options.rounds):
                for clients in (1, 2):
                    for window in (1, 4):
                        config = job_config("server-hierarchical", clients, accumulate=8, max_micros=window)
                        before = emulated_parts(times, 2) if times else measured_parts(model, 1, 2)
                        finished = run_job(server, url, model, config, ROWS, times)
                        parts = before if times else between(before, measured_parts(model, 1, 2))
                        bounds = window_bounds(8, window, parts, TRIP_MS / 1000)
                        if clients > 1:
                            cores = 1e9 if times else os.cpu_count() or 1
                            server_time = min(parts.b[clients], clients * parts.b[1])
                            bounds["server of both"] = 8 * server_time
                            bounds["cores"] = 8 * (server_time + clients * parts.ends) / cores
                        found = judged(config, finished, bounds)
                        name = f"{kind}: {clients} clients, window {window}"
                        rounds.setdefault(name, []).append(found)
                        show(name, found)
    return {"lines": {name: summed_up(found) for name, found in rounds.items()}, "fit": asdict(quick)}


SECTIONS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "compute": compute,
    "emulated": emulated,
    "overlap": overlap,
}


def main() -> None:
    """Run the sections asked for; each is recorded by itself."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []])
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    for name in options.sections or SECTIONS:
        begin = time.perf_counter()
        figures = SECTIONS[name](options)
        figures |= {"trip_ms": TRIP_MS, "rows": ROWS, "warm": WARM, "timed": TIMED}
        record(f"training_speed-{name}", figures)
        print(f"{name}: {time.perf_counter() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
