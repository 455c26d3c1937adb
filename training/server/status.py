"""A job as REST shows it."""

from __future__ import annotations

from typing import Any

from training.server.job import Job


def describe(job: Job) -> dict[str, Any]:
    """Give everything about a job but its key."""
    record, tally = job.record, job.record.tally
    return {
        "id": record.id,
        "name": record.config.name,
        "state": job.state,
        "reason": record.reason,
        "created": int(record.created),
        "config": record.config.model_dump(mode="json"),
        "step": record.step,
        "steps": record.config.steps,
        "generation": record.generation,
        "loss": tally.loss,
        "tokens": tally.tokens,
        "samples": tally.samples,
        "skipped": tally.skipped,
        "seconds": round(job.seconds, 3),
        "activation_bytes": job.activation_bytes,
        "checkpoint_error": job.keeper.error,
        "members": [_describe_seat(job, index) for index in sorted(job.roster.seats)],
    }


def _describe_seat(job: Job, index: int) -> dict[str, Any]:
    seat, tally = job.roster.seats[index], job.record.tally.member(index)
    return {
        "index": index,
        "name": seat.name,
        "present": seat.present,
        "step": job.step_of(index),
        "samples": tally.samples,
        "left_out": tally.left_out,
        "clipped": tally.clipped,
        "skipped": tally.skipped,
    }


def brief(job: Job) -> dict[str, Any]:
    """Give what a list shows of a job."""
    record = job.record
    return {
        "id": record.id,
        "name": record.config.name,
        "state": job.state,
        "step": record.step,
        "steps": record.config.steps,
        "created": int(record.created),
    }
