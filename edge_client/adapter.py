"""The adapter of an edge: A's and C's part of it, from the server or from a folder of one's own; B's is the server's.

What the server hands out runs before the noise, so it is pinned on first use like the weights: a server that changed it
from one session to the next would get the same text under ever new noise.
"""

from __future__ import annotations

from dataclasses import dataclass

from edge_client.rest import AdapterCard, ModelCard, RestClient
from edge_client.settings import AdapterChoice, EdgeSettings
from edge_client.state_files import StateFolder
from split_llama.config import BlockRange, ModelConfig, Partition
from split_llama.errors import AdapterMismatch, FlLlamaError, PinMismatch
from split_llama.lora import Adapter, parse_adapter, read_adapter


@dataclass(frozen=True, slots=True)
class EdgeAdapter:
    """The adapter that sessions name to the server, and `own`, the part of it that runs here."""

    name: str
    own: Adapter

    def sent_digest(self, a: BlockRange) -> str:
        """SHA-256 (hex) of what shapes the states sent, the part in A; empty where A has none.

        With other weights in C alone the same rows are sent, and they must not be sent again under other noise.
        """
        part = self.own.part(a)
        return part.digest() if part.tensors else ""


def find_adapter(
    settings: EdgeSettings,
    rest: RestClient,
    state: StateFolder,
    card: ModelCard,
    partition: Partition,
    geometry: ModelConfig,
) -> EdgeAdapter | None:
    """Find and check what the settings ask for. Blocking.

    Raises `UsageError` for an adapter that the server does not hold, `AdapterMismatch` for one that does not fit,
    `PinMismatch` for one that changed, and what reading or fetching raises.
    """
    choice = settings.adapter_choice()
    if choice is None:
        return None
    held = card.find_adapter(choice.name)
    try:
        whole = _read(choice, rest, partition)
        whole.check(geometry)
        own = _own_part(whole, partition, geometry.num_hidden_layers)
        _check_blocks(choice, held, whole, own, partition, geometry.num_hidden_layers)
    except FlLlamaError as error:
        raise type(error)(f"--adapter {choice}: {error.message}; nothing was sent") from error
    if choice.folder is None:
        _check_pin(settings, rest, state, EdgeAdapter(choice.name, own), partition)
    return EdgeAdapter(choice.name, own)


def _read(choice: AdapterChoice, rest: RestClient, partition: Partition) -> Adapter:
    if choice.folder is not None:
        return read_adapter(choice.folder)
    return parse_adapter(rest.adapter_part(choice.name, partition), f"what {rest.address.base} sent")


def _own_part(whole: Adapter, partition: Partition, count: int) -> Adapter:
    a, c = whole.part(partition.segment_a(count)), whole.part(partition.segment_c(count))
    return Adapter(whole.lora, {**a.tensors, **c.tensors})


def _check_blocks(
    choice: AdapterChoice, held: AdapterCard, whole: Adapter, own: Adapter, partition: Partition, count: int
) -> None:
    """See that each adapted block runs where its weights are: a block left out would change the text silently."""
    served = partition.segment_b(count)
    there = range(served.start, served.stop)
    if choice.folder is None and not own.tensors and partition != Partition(0, 0):
        raise AdapterMismatch(
            f"the server holds no weights of it for the blocks that run here under partition {partition}. If they are "
            "private, give the folder that has them: --adapter NAME=DIR"
        )
    lost = [block for block in held.blocks if block not in there and block not in own.blocks]
    if lost:
        raise AdapterMismatch(
            f"block {lost[0]} runs here under partition {partition} and has weights in the server's adapter, but none "
            "in yours; choose the partition that it was trained with"
        )
    lost = [block for block in whole.blocks if block in there and block not in held.blocks]
    if lost:
        raise AdapterMismatch(
            f"block {lost[0]} runs on the server under partition {partition} and has weights in your folder, but none "
            "in the server's adapter; choose the partition that it was trained with"
        )


def _check_pin(
    settings: EdgeSettings, rest: RestClient, state: StateFolder, adapter: EdgeAdapter, partition: Partition
) -> None:
    url, key, digest = rest.address.base, f"{adapter.name} {partition}", adapter.own.digest()
    with state.edit_pins() as pins:
        pinned = pins.setdefault(url, {}).setdefault("adapters", {})
        if pinned.get(key, digest) != digest and not settings.accept_new_weights:
            raise PinMismatch(
                f"{url} now offers another adapter {adapter.name!r} than at first use (pinned {pinned[key][:12]}, "
                f"offered {digest[:12]}); nothing was sent. If you expected a new one, run again with "
                "--accept-new-weights"
            )
        pinned[key] = digest
