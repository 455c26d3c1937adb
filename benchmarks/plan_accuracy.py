"""What `edge-client plan` foretells against what `edge-client bench` then measures.

    python -m benchmarks.plan_accuracy [--rtt 0,20 --models demo,134M --rounds 4 --tokens 48 --threads 1]

For every model and link, in turns: a plan, then real answers without guesses at partitions and in formats that the plan
spoke of. The link is loopback, or goes through `split-loadtest proxy`. Each case's error is the median foretold over
the median measured, less one: plans and answers take turns, so that a machine whose speed drifts hurts both alike.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import MODEL_134M, record, running_server, write_random_model
from edge_client.planning.bench import Bench, BenchPlan, Mode
from edge_client.planning.cost import Choice, Format, Task, predict
from edge_client.planning.measure import Findings, find_subject, measure
from edge_client.rest import RestClient
from edge_client.runtime import EdgeRuntime
from edge_client.settings import EdgeSettings
from split_llama.config import Partition
from split_llama.wire.codec import Codec

FORMATS = (Format("float32"), Format("float32", "int8"))
CASES = (
    (Partition(1, 1), FORMATS[0]),
    (Partition(3, 2), FORMATS[0]),
    (Partition(1, 1), FORMATS[1]),
)
PROMPT = 32


@contextlib.contextmanager
def link_to(url: str, rtt_ms: float) -> Iterator[str]:
    """Give the server's address, over an emulated link if there is a round trip to emulate."""
    if not rtt_ms:
        yield url
        return
    script = "import sys; from loadtest.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", script, "proxy", "--target", url, "--rtt", str(rtt_ms)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.wait(timeout=30)


def find(settings: EdgeSettings) -> Findings:
    """Measure what a plan rests on."""
    rest = RestClient.of(settings)
    try:
        subject = find_subject(settings, rest, rest.model_card())
    finally:
        rest.close()
    return asyncio.run(measure(subject, FORMATS, lambda _line: None))


async def measured_answers(settings: EdgeSettings, tokens: int) -> Mode:
    """Answer twice, without guesses."""
    async with EdgeRuntime.connect(settings) as edge:
        result = await Bench(settings, BenchPlan(PROMPT, tokens, 2), edge).run(lambda _line: None)
    (mode,) = result.modes
    return mode


def compare(settings: EdgeSettings, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Plan once, then measure every case."""
    findings = find(settings)
    rows = []
    for partition, format in CASES:
        choice = Choice(partition, format, Codec.FP16, 0)
        foretold = predict(findings.measured, choice, Task(PROMPT, options.tokens, True))
        chosen = dataclasses.replace(
            settings, partition=str(partition), dtype=format.dtype, quantization=format.quantization
        )
        mode = asyncio.run(measured_answers(chosen, options.tokens))
        speed = mode.median_speed
        rows.append(
            {
                "partition": str(partition),
                "weights": format.label,
                "foretold": foretold.tokens_per_second,
                "measured": speed,
                "error": foretold.tokens_per_second / speed - 1,
                "measured_typical": mode.typical_speed,
                "error_of_typical": foretold.tokens_per_second / mode.typical_speed - 1,
                "foretold_first_ms": 1000 * foretold.first_token_seconds,
                "measured_first_ms": 1000 * mode.first_token_seconds,
                "foretold_ms": {name: 1000 * seconds for name, seconds in foretold.parts.as_dict().items()},
                "measured_ms": {name: 1000 * seconds for name, seconds in mode.parts.as_dict().items()},
            }
        )
    return rows


def run_model(name: str, folder: str, options: argparse.Namespace, home: Path) -> list[dict[str, Any]]:
    """Run all links and rounds of one model."""
    rows = []
    with running_server(folder, "--threads", str(options.threads)) as url:
        for rtt in map(float, options.rtt.split(",")):
            with link_to(url, rtt) as address:
                settings = EdgeSettings(
                    server=address,
                    speculate="off",
                    device="cpu",
                    threads=options.threads,
                    cache_dir=home / "cache",
                    state_dir=home / f"state-{name}-{rtt}",
                )
                for _ in range(options.rounds):
                    for row in compare(settings, options):
                        rows.append({"model": name, "rtt_ms": rtt} | row)
                        print(_line(rows[-1]), flush=True)
    return rows


def summarise(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Give each case's medians over the rounds, and its errors."""
    keys = ("model", "rtt_ms", "partition", "weights")
    cases = []
    for case in dict.fromkeys(tuple(row[key] for key in keys) for row in rows):
        own = [row for row in rows if tuple(row[key] for key in keys) == case]
        names = ("foretold", "measured", "measured_typical", "foretold_first_ms", "measured_first_ms")
        medians = {name: statistics.median(row[name] for row in own) for name in names}
        errors = {
            "error": medians["foretold"] / medians["measured"] - 1,
            "error_of_typical": medians["foretold"] / medians["measured_typical"] - 1,
            "error_of_first": medians["foretold_first_ms"] / medians["measured_first_ms"] - 1,
        }
        cases.append(dict(zip(keys, case, strict=True)) | {"rounds": len(own)} | medians | errors)
    return cases


def _line(row: Mapping[str, Any]) -> str:
    return (
        f"{row['model']:5} rtt {row['rtt_ms']:4.0f} ms  {row['partition']} {row['weights']:8}"
        f" foretold {row['foretold']:6.1f}  measured {row['measured']:6.1f} tokens/s  {row['error']:+.1%}"
        f"  (typical {row['measured_typical']:.1f}, {row['error_of_typical']:+.1%})"
        f"  first {row['foretold_first_ms']:.1f} / {row['measured_first_ms']:.1f} ms"
    )


def main() -> None:
    """Run and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rtt", default="0,20", metavar="MS,...")
    parser.add_argument("--models", default="demo,134M")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        for name in options.models.split(","):
            folder = name if name == "demo" else str(write_random_model(home / "model", MODEL_134M))
            rows += run_model(name, folder, options, home)
    cases = summarise(rows)
    for case in cases:
        print(case)
    record(f"plan_accuracy-{options.models.replace(',', '-')}", {"cases": cases, "rows": rows})


if __name__ == "__main__":
    main()
