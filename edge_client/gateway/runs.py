"""From a request's prompts to the events of its choices, and what they used."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from edge_client.gateway.errors import ApiError
from edge_client.gateway.requests import AnyRequest
from edge_client.gateway.service import Answer, AnswerService
from edge_client.gateway.settings import GatewaySettings
from edge_client.gateway.streaming import merge
from edge_client.turn import GenerationParams, TokenEvent
from edge_client.usual_params import usual_params

# First the answer itself, once its prompt was read (and scored), then its tokens.
Item = Answer | TokenEvent


@dataclass(frozen=True, slots=True)
class Job:
    """One prompt and how each of its choices is made."""

    ids: list[int]
    params: list[GenerationParams]


class Runner:
    """Runs jobs on the service and remembers their answers."""

    def __init__(self, service: AnswerService, gateway: GatewaySettings, jobs: Sequence[Job], owner: str) -> None:
        self._service = service
        self._at_once = gateway.max_concurrent
        self._jobs = jobs
        self._owner = owner
        self._answers: list[Answer] = []

    async def items(self) -> AsyncGenerator[tuple[int, Item], None]:
        """Give (index of the choice, item). Choices are numbered through: those of the first prompt first."""
        sources = [partial(self._job, job) for job in self._jobs]
        width = max(len(job.params) for job in self._jobs)
        async with self._service.request(), contextlib.aclosing(merge(sources, self._at_once)) as found:
            async for place, (choice, item) in found:
                yield place * width + choice, item

    async def _job(self, job: Job) -> AsyncGenerator[tuple[int, Item], None]:
        groups = [job.params]
        if len(job.params) > 1 and job.params[0].prompt_logprobs is not None:
            # One answer scores the prompt for all; the others go on from what it leaves behind.
            others = [dataclasses.replace(params, prompt_logprobs=None) for params in job.params[1:]]
            groups = [job.params[:1], others]
        first = 0
        for group in groups:
            async with self._service.answers(job.ids, group, owner=self._owner) as answers:
                answers[0].counts_prompt = first == 0
                self._answers += answers
                sources = [partial(_items, answer) for answer in answers]
                async with contextlib.aclosing(merge(sources, len(sources))) as found:
                    async for place, item in found:
                        yield first + place, item
            first += len(group)

    def usage(self) -> dict[str, Any]:
        """Give OpenAI's usage object. A prompt counts once, however many choices it has."""
        prompt = sum(len(job.ids) for job in self._jobs)
        completion = sum(len(answer.turn.tokens) for answer in self._answers)
        accepted = sum(answer.stats.accepted for answer in self._answers)
        drafted = sum(answer.stats.drafted for answer in self._answers)
        # Choices of one prompt have it from each other: only what was there before the request counts.
        cached = sum(answer.stats.cached_tokens for answer in self._answers if answer.counts_prompt)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": min(cached, prompt)},
            "completion_tokens_details": {
                "accepted_prediction_tokens": accepted,
                "rejected_prediction_tokens": drafted - accepted,
            },
        }


async def _items(answer: Answer) -> AsyncGenerator[Item, None]:
    is_told = False
    async with contextlib.aclosing(answer.events()) as events:
        async for event in events:
            if not is_told:
                yield answer
                is_told = True
            yield event
    if not is_told:
        yield answer


def make_params(
    service: AnswerService, gateway: GatewaySettings, request: AnyRequest, max_new_tokens: int, **extras: Any
) -> list[GenerationParams]:
    """Give the params of each of the request's choices; `extras` are fields of `GenerationParams`.

    Raises `ApiError`, `UsageError`.
    """
    count = 1 if request.n is None else request.n
    most = min(gateway.max_n, gateway.max_concurrent)
    if count > most:
        raise ApiError(f"n is {count}, at most {most} choices are possible here (--max-n)", param="n")
    seed = service.settings.seed if request.seed is None else request.seed
    choices = []
    for choice in range(count):
        params = usual_params(
            service.edge,
            service.settings,
            max_new_tokens=max_new_tokens,
            stop=request.stops(),
            ignore_eos=bool(request.ignore_eos),
            seed=None if seed is None else seed + choice,
            **request.sampling(),
        )
        eos = (*params.eos_token_ids, *(request.stop_token_ids or ()))
        choices.append(dataclasses.replace(params, eos_token_ids=eos, **extras))
    return choices


async def collect(runner: Runner, take: Callable[[int, Item], object]) -> None:
    """Run to the end, handing every item to `take`."""
    async with contextlib.aclosing(runner.items()) as items:
        async for index, item in items:
            take(index, item)
            # Tokens of a draft come at once: let others have the loop in between.
            await asyncio.sleep(0)
