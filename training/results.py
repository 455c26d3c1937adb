"""What a run leaves: the adapter that all share, a summary, and what to do with them."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

from edge_client.state_files import cache_errors, write_atomically
from split_llama.json_file import read_json
from split_llama.lora import adapter_bytes
from training.client.jobs import JobsClient
from training.client.report import StepRecord, size
from training.display import Display, Followed
from training.run_file import RunFile
from training.site import SHARED_FILE, SUMMARY_FILE, Site

DONE = "done"


def finish(site: Site, display: Display | None, seconds: float) -> dict[str, Any]:
    """Fetch what the server holds, and write it and the summary; gives the summary. Raises `FlLlamaError`."""
    out = site.file.out
    with JobsClient.of(site.settings()) as jobs:
        status = jobs.status(site.job)
        if "B" in site.file.job.lora.segments or site.file.job.shares_all:
            with cache_errors("write the shared adapter"):
                write_atomically(out / SHARED_FILE, adapter_bytes(jobs.adapter(site.job), site.model))
    summary = {
        "job": site.job.id,
        "state": status.get("state"),
        "strategy": site.file.job.strategy,
        "clients": site.file.job.clients,
        "steps": status.get("step"),
        "seconds": round(seconds, 1),
        "members": status.get("members"),
    } | (_totals(display) if display is not None else {})
    with cache_errors("write the summary"):
        write_atomically(out / SUMMARY_FILE, json.dumps(summary, indent=1).encode())
    return summary


def finished(file: RunFile) -> dict[str, Any] | None:
    """Give the summary of a run that was done in the file's folder; `None` where it was not. Raises `UsageError`."""
    path = file.out / SUMMARY_FILE
    summary = read_json(path) if path.is_file() else {}
    return summary if summary.get("state") == DONE and isinstance(summary.get("seconds"), int | float) else None


def _totals(display: Display) -> dict[str, Any]:
    """Add up what the clients' logs say, of all the processes that wrote them."""
    logs = {name: Followed(name, followed.path).read()[0] for name, followed in display.followed.items()}
    newest = [record for records in logs.values() for record in _last_of_each_process(records)]
    every = [record for records in logs.values() for record in records]
    by_step: dict[int, dict[str, float]] = {}
    for name, records in logs.items():
        for record in records:
            if record.job_loss is not None:
                # Where each has a loss of its own, the mean; a step that was done again counts as it was last.
                by_step.setdefault(record.step, {})[name] = record.job_loss
    losses = [math.fsum(by_step[step].values()) / len(by_step[step]) for step in sorted(by_step)]
    tenth = max(1, len(losses) // 10)
    return {
        "loss_first": _mean(losses[:tenth]),
        "loss_last": _mean(losses[-tenth:]),
        "tokens": sum(record.tokens for record in every),
        "samples": sum(record.samples for record in every),
        "bytes_up": sum(record.bytes_up for record in newest),
        "bytes_down": sum(record.bytes_down for record in newest),
    }


def _last_of_each_process(records: Sequence[StepRecord]) -> list[StepRecord]:
    """Give the records with the totals: where they fall, another process began."""
    nexts = [*records[1:], None]
    return [now for now, then in zip(records, nexts, strict=True) if then is None or then.bytes_up < now.bytes_up]


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def what_next(site: Site, summary: dict[str, Any]) -> Iterator[str]:
    """Say what there is now, and what can be done with it."""
    out, data, model = site.file.out, site.file.data, shlex.quote(site.model)
    first, last = summary.get("loss_first"), summary.get("loss_last")
    losses = f", loss {first:.3f} -> {last:.3f}" if first is not None and last is not None else ""
    traffic = f"{size(summary.get('bytes_up', 0))} up, {size(summary.get('bytes_down', 0))} down"
    yield f"{summary['state']}: {summary['steps']} steps in {summary['seconds']:.0f} s{losses}, {traffic}"
    merged = out / "merged"
    owner = "" if site.file.job.shares_all else f" --client {site.client_name(0)}"
    examples = f" --data {data.validation}" if data.validation else "" if data.task == "demo" else " --data FILE"
    yield f"results are in {out}"
    if summary["state"] != DONE:
        return
    yield "next:"
    yield f"  split-train export {out}{owner} --out {merged}"
    yield f"  split-train evaluate --model {model} --adapter {merged} --task {data.task}{examples}"
    yield f"  split-server {model} --lora-modules mine={merged}"
    yield f"  edge-client chat --server http://127.0.0.1:8700 --adapter mine={merged}"
