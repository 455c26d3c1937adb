"""Jobs over REST: created, listed, shown, paused, resumed, cancelled, removed; their shared adapters fetched.

A job's key is every member's, so where the server has API keys the creator's alone changes the job.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Body, Depends, Header, Response

from split_llama.errors import NotOwner
from training.server.extension import ANONYMOUS
from training.server.job import Job
from training.server.status import brief, describe

if TYPE_CHECKING:
    from training.server.extension import TrainingExtension

KEY_HEADER = "X-FL-Job-Key"


@dataclass(frozen=True, slots=True)
class _Doors:
    """Who may do what, as FastAPI's dependencies: the owner of an API key, a job it may see, a job it may change."""

    owner: Any
    job: Any
    own_job: Any

    @classmethod
    def of(cls, extension: TrainingExtension) -> _Doors:
        """Make them."""

        async def authenticate(authorization: Annotated[str | None, Header()] = None) -> str:
            return extension.host.authenticate(authorization)

        owner = Depends(authenticate)

        async def open_job(
            ident: str, who: str = owner, key: Annotated[str | None, Header(alias=KEY_HEADER)] = None
        ) -> Job:
            job = extension.find(ident)
            is_creator = who == job.record.owner and who != ANONYMOUS
            if not job.has_key(key) and (key is not None or not is_creator):
                raise NotOwner(f"the job {ident} is another's: send its key in the header {KEY_HEADER}")
            return job

        open_for_all = Depends(open_job)

        async def change_job(who: str = owner, job: Job = open_for_all) -> Job:
            # Nobody in particular has the job's key then, or the request would not have come so far.
            if who != job.record.owner and ANONYMOUS not in (who, job.record.owner):
                raise NotOwner(f"only the creator of the job {job.record.id} pauses, resumes, cancels or removes it")
            return job

        return _Doors(owner, open_for_all, Depends(change_job))


def make_router(extension: TrainingExtension) -> APIRouter:
    """All routes below /v1/jobs.

    A job is opened by its creator's API key, or by its own key; it is changed by its creator's API key, and by its own
    key only where there are no API keys.
    """
    router = APIRouter(prefix="/v1/jobs", tags=["fine-tuning"])
    doors = _Doors.of(extension)
    owner, open_for_all, open_for_creator = doors.owner, doors.job, doors.own_job

    @router.post("", summary="Create a job; the answer shows its key, this once")
    async def create(raw: Annotated[dict[str, Any], Body()], who: str = owner) -> dict[str, Any]:
        job, key = await extension.create(raw, who)
        return {**describe(job), "key": key}

    @router.get("", summary="Your own jobs")
    async def jobs(who: str = owner) -> dict[str, Any]:
        return {"object": "list", "data": [brief(job) for job in extension.of_owner(who)]}

    @router.get("/{ident}", summary="How a job stands")
    async def show(job: Job = open_for_all) -> dict[str, Any]:
        return describe(job)

    @router.post("/{ident}/pause", summary="Stand still until it is resumed")
    async def pause(job: Job = open_for_creator) -> dict[str, Any]:
        await job.pause()
        return describe(job)

    @router.post("/{ident}/resume", summary="Go on")
    async def resume(job: Job = open_for_creator) -> dict[str, Any]:
        await job.resume()
        return describe(job)

    @router.delete("/{ident}", summary="Cancel it, the adapters stay as they are; remove one that has ended")
    async def cancel(job: Job = open_for_creator) -> dict[str, Any]:
        if job.record.ended is None:
            await job.cancel()
            return {**describe(job), "removed": False}
        await extension.remove(job)
        return {**describe(job), "removed": True}

    @router.get("/{ident}/adapter", response_class=Response, summary="The shared adapters, as safetensors")
    async def adapter(job: Job = open_for_all) -> Response:
        headers = {"Content-Disposition": f'attachment; filename="{job.record.id}.safetensors"'}
        return Response(await job.keeper.adapter(), media_type="application/octet-stream", headers=headers)

    return router
