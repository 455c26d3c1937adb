"""`--partition auto`: the choice of the last plan, or of a short one that is made now."""

from __future__ import annotations

import asyncio

from edge_client.planning.choice import Recommendation, recommend
from edge_client.planning.cost import Task, predict_all
from edge_client.planning.measure import Findings, find_subject, least_partition, measure, own_format
from edge_client.planning.remembered import ChoiceMemory, Remembered
from edge_client.planning.talk import Notify
from edge_client.planning.words import why_partition
from edge_client.rest import ModelCard, RestClient
from edge_client.settings import EdgeSettings
from edge_client.weights import ask_offer
from split_llama.config import Partition
from split_llama.load import parse_device
from split_llama.wire.codec import Codec

# A short answer to a short question; the choice hardly depends on it.
USUAL_TASK = Task(prompt_tokens=64, answer_tokens=128, noise=True)


def resolve_partition(settings: EdgeSettings, rest: RestClient, card: ModelCard, notify: Notify) -> Partition:
    """Give the partition for these settings, and say why. Blocking, in a thread without an event loop.

    Where nothing was chosen before it measures for some seconds, with rows of random numbers. Raises `FlLlamaError`.
    """
    memory = choice_memory(settings, rest, card)
    with memory.choosing():
        known = memory.load()
        if known is None:
            known = _choose(settings, rest, card, notify)
            memory.save(known)
            notify(f"partition {known.partition}: {known.reason}; it stays until edge-client plan chooses anew")
        else:
            notify(f"partition {known.partition}, as chosen before for this model: {known.reason}")
    return known.partition


def _choose(settings: EdgeSettings, rest: RestClient, card: ModelCard, notify: Notify) -> Remembered:
    notify("partition auto: nothing is chosen for this model yet; measuring for some seconds")
    subject = find_subject(settings, rest, card)
    format = own_format(settings, card, subject.geometry.device.type)
    findings = asyncio.run(measure(subject, [format], lambda _line: None))
    advice = choose_partition(findings, settings)
    return Remembered(advice.best.choice.partition, why_partition(advice, findings.measured))


def choose_partition(findings: Findings, settings: EdgeSettings) -> Recommendation:
    """Choose with the settings' own codec and without guesses, which do not depend on where the model is cut."""
    codec = Codec.parse(settings.codec)
    predictions = predict_all(findings.measured, findings.measured.model.partitions(), [codec], [0], USUAL_TASK)
    return recommend(predictions, findings.free_bytes)


def choice_memory(settings: EdgeSettings, rest: RestClient, card: ModelCard) -> ChoiceMemory:
    """Find where the choice for this server's model on this device is kept."""
    offer = ask_offer(rest, least_partition(card), card.geometry)
    return ChoiceMemory(settings.states(), card, offer.manifest.digest, str(parse_device(settings.device)))
