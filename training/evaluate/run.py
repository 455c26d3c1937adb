"""One evaluation from its plan to its rows: the whole model, then the split one at each partition and noise."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from edge_client.settings import EdgeSettings
from split_llama.config import Partition
from split_llama.errors import ContextExceeded
from split_llama.lora import read_adapter
from training.attacks.measure import Intercepted, make_attack, run_attack, shuffled
from training.attacks.public import PublicModel
from training.evaluate.backend import Backend, Progress
from training.evaluate.central import CentralModel
from training.evaluate.questions import Questions, Result
from training.evaluate.server import local_server
from training.evaluate.split import SplitModel
from training.evaluate.table import Attacked, Row

NO_NOISE = "0"
# The name of a local folder's adapter at a server of our own.
ADAPTER_NAME = "evaluated"


@dataclass(frozen=True)
class AttackPlan:
    """Which attack to run, on the first `tokens` tokens of the first `texts` examples; whether it has the adapter."""

    name: str
    texts: int
    tokens: int
    knows_adapter: bool = True


@dataclass(frozen=True)
class Plan:
    """What to evaluate. `folder` is the whole model's; `adapter` a PEFT folder over it.

    `edge` are the settings of the split; its server is started here unless they name one, its partition and noise come
    from `partitions` and `noises`.
    """

    folder: Path
    adapter: Path | None
    edge: EdgeSettings
    partitions: tuple[str, ...]
    noises: tuple[str, ...]
    batch: int
    central: bool = True
    split: bool = True
    attack: AttackPlan | None = None


# Told the name of a row that begins; gives where to report how many of its examples are done.
Begin = Callable[[str], Progress]


class Evaluation:
    """Runs a plan over the questions of a task."""

    def __init__(self, plan: Plan, questions: Questions, begin: Begin, notify: Callable[[str], None]) -> None:
        self._plan = plan
        self._questions = questions
        self._begin = begin
        self._notify = notify

    async def rows(self) -> AsyncIterator[Row]:
        """Yield the rows as they are done. Raises `FlLlamaError`."""
        plan = self._plan
        if plan.central:
            yield await self._central("centralized", None)
            if plan.adapter is not None:
                yield await self._central("centralized + adapter", plan.adapter)
        if plan.split:
            with self._server() as settings:
                for partition in plan.partitions:
                    for noise in dict.fromkeys((NO_NOISE, *plan.noises)):
                        yield await self._split(dataclasses.replace(settings, partition=partition, noise=noise))

    async def _central(self, name: str, adapter: Path | None) -> Row:
        edge = self._plan.edge
        model = CentralModel.load(
            self._plan.folder, adapter, dtype=edge.dtype, device=edge.device, batch=self._plan.batch
        )
        row = Row(name, await self._ask(name, model))
        del model
        # The next model may need the room.
        gc.collect()
        return row

    async def _split(self, settings: EdgeSettings) -> Row:
        name = "split + adapter" if settings.adapter else "split"
        label = f"{name} {settings.partition} noise {settings.noise}"
        async with SplitModel.connect(settings, self._plan.batch, self._notify) as model:
            if self._questions.longest > model.edge.max_length:
                raise ContextExceeded(
                    f"the longest example has {self._questions.longest} tokens with its answer, and the server takes "
                    f"{model.edge.max_length}; give --max-length {model.edge.max_length}"
                )
            result = await self._ask(label, model)
            attacked = await self._attack(model, settings)
        return Row(name, result, settings.partition, settings.noise, settings.codec, attacked)

    async def _ask(self, label: str, model: Backend) -> Result:
        return await self._questions.ask(model, self._begin(label))

    async def _attack(self, model: SplitModel, settings: EdgeSettings) -> Attacked | None:
        attack = self._plan.attack
        if attack is None:
            return None
        seen = await model.intercept(self._questions.texts(attack.texts, attack.tokens))
        known = self._plan.adapter if attack.knows_adapter else None
        public = PublicModel.open(
            self._plan.folder,
            Partition.parse(settings.partition).p,
            None if known is None else read_adapter(known),
        )
        # It may take minutes, and the connection wants to be kept alive meanwhile.
        return await asyncio.to_thread(_attacked, attack.name, public, seen)

    @contextlib.contextmanager
    def _server(self) -> Iterator[EdgeSettings]:
        """Give the settings of an edge for the server named, or for one of our own that runs for the block."""
        plan = self._plan
        if plan.edge.server is not None:
            yield plan.edge
            return
        partitions = [Partition.parse(text) for text in plan.partitions]
        least = Partition(min(each.p for each in partitions), min(each.q for each in partitions))
        flags = [str(plan.folder), "--allowed-partitions", str(least), "--device", plan.edge.device]
        flags += ["--dtype", plan.edge.dtype]
        if plan.edge.threads is not None:
            flags += ["--threads", str(plan.edge.threads)]
        adapter = None
        if plan.adapter is not None:
            adapter = f"{ADAPTER_NAME}={plan.adapter}"
            flags += ["--lora-modules", adapter]
        self._notify("starting a split-server on this machine")
        with local_server(flags) as server:
            yield dataclasses.replace(
                plan.edge, server=server.url, api_key=server.api_key, adapter=adapter, fallback_server=()
            )


def _attacked(name: str, public: PublicModel, seen: Sequence[Intercepted]) -> Attacked:
    attack, bos = make_attack(name, public), public.bos_token_id
    return Attacked(name, run_attack(name, attack, seen, bos), run_attack(name, attack, shuffled(seen, bos), bos))
