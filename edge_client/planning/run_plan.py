"""`edge-client plan` behind its flags."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
from dataclasses import dataclass

from edge_client.planning import plan_report
from edge_client.planning.auto import choice_memory
from edge_client.planning.choice import CODECS, recommend
from edge_client.planning.cost import Drafting, LinkSpeed, Task, predict_all
from edge_client.planning.drafts import measure_drafts
from edge_client.planning.measure import Findings, find_subject, formats_to_try, least_partition, measure, own_format
from edge_client.planning.plan_report import Outlook, PlanResult
from edge_client.planning.remembered import ChoiceMemory, Remembered
from edge_client.planning.talk import Notify, notifier
from edge_client.planning.words import why_partition
from edge_client.rest import ModelCard, RestClient
from edge_client.settings import EdgeSettings
from split_llama.noise import NoiseSpec

GUESSES = (0, 1, 2, 4, 8, 16)


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What to foretell. `acceptance` is assumed, unless drafts are measured."""

    prompt_tokens: int = 64
    answer_tokens: int = 128
    target_rtts_ms: tuple[float, ...] = ()
    acceptance: float | None = None
    measure_drafts: bool = False


def plan(settings: EdgeSettings, request: PlanRequest, card: ModelCard, *, as_json: bool, quiet: bool) -> None:
    """Measure, print the report on stdout, and keep the partition for `--partition auto`. Raises `FlLlamaError`."""
    notify = notifier(quiet)
    rest = RestClient.of(settings)
    try:
        subject = find_subject(settings, rest, card)
        memory = choice_memory(settings, rest, card)
    finally:
        rest.close()
    own = own_format(settings, card, subject.geometry.device.type)
    formats = formats_to_try(own, subject.geometry.device.type)
    findings = asyncio.run(measure(subject, formats, notify))
    findings = _with_drafting(findings, _drafting(findings, settings, request, card, notify))
    result = foretell(settings, findings, request)
    text = json.dumps(plan_report.as_json(result)) + "\n" if as_json else plan_report.as_text(result)
    sys.stdout.write(text)
    _remember(memory, result, notify)


def _remember(memory: ChoiceMemory, result: PlanResult, notify: Notify) -> None:
    advice = result.outlooks[0].advice
    partition, before = advice.best.choice.partition, memory.load()
    memory.save(Remembered(partition, why_partition(advice, result.findings.measured)))
    notify(f"--partition auto means {partition} for this model from now on")
    if before is not None and before.partition != partition:
        notify(
            f"until now it meant {before.partition}: whatever was sent under that and is sent again is released a "
            "second time, with other noise (docs/privacy.md)"
        )


def foretell(settings: EdgeSettings, findings: Findings, request: PlanRequest) -> PlanResult:
    """Predict for the link as it is, and for each round trip asked for."""
    task = Task(request.prompt_tokens, request.answer_tokens, NoiseSpec.parse(settings.noise).is_on)
    link = findings.measured.link
    links = [link, *(dataclasses.replace(link, round_trip=ms / 1000) for ms in request.target_rtts_ms)]
    return PlanResult(settings.server_url(), findings, task, tuple(_outlook(findings, link, task) for link in links))


def _outlook(findings: Findings, link: LinkSpeed, task: Task) -> Outlook:
    measured = dataclasses.replace(findings.measured, link=link)
    predictions = predict_all(measured, measured.model.partitions(), CODECS, GUESSES, task)
    return Outlook(link, recommend(predictions, findings.free_bytes), tuple(predictions))


def _drafting(
    findings: Findings, settings: EdgeSettings, request: PlanRequest, card: ModelCard, notify: Notify
) -> Drafting:
    assumed = findings.measured.drafting
    if request.acceptance is not None:
        return dataclasses.replace(assumed, acceptance=request.acceptance, source="as given, one block's time each")
    if not request.measure_drafts:
        return assumed
    notify("measuring guesses with a short real answer to a public prompt")
    if settings.partition == "auto":
        settings = dataclasses.replace(settings, partition=str(least_partition(card)))
    return asyncio.run(measure_drafts(settings, card, notify)) or assumed


def _with_drafting(findings: Findings, drafting: Drafting) -> Findings:
    return dataclasses.replace(findings, measured=dataclasses.replace(findings.measured, drafting=drafting))
