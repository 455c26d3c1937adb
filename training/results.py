"""What a run leaves: the adapter that all share, a summary, and what to do with them."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

from edge_client.state_files import cache_errors, write_atomically
from split_llama.lora import adapter_bytes
from training.client.jobs import JobsClient
from training.client.report import size
from training.display import Display
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


def _totals(display: Display) -> dict[str, Any]:
    """Add up what the clients' logs say."""
    newest = [followed.records[-1] for followed in display.followed.values() if followed.records]
    every = [record for followed in display.followed.values() for record in followed.records]
    by_step: dict[int, dict[str, float]] = {}
    for name, followed in display.followed.items():
        for record in followed.records:
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


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def what_next(site: Site, summary: dict[str, Any]) -> Iterator[str]:
    """Say what there is now, and what can be done with it."""
    out, data, model = site.file.out, site.file.data, shlex.quote(site.model)
    first, last = summary.get("loss_first"), summary.get("loss_last")
    losses = f", loss {first:.3f} -> {last:.3f}" if first is not None and last is not None else ""
    traffic = f"{size(summary['bytes_up'])} up, {size(summary['bytes_down'])} down"
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
