"""Real answers through the real edge, and where their time went."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edge_client.connector import Connector
from edge_client.decoding import Pace
from edge_client.link import ServerLink
from edge_client.planning.cost import LinkSpeed, Parts
from edge_client.planning.link_speed import Prober, measure_round_trip
from edge_client.planning.server_clock import ServerClock
from edge_client.planning.talk import Notify
from edge_client.planning.watch import Watched, mean_parts, watch
from edge_client.runtime import EdgeRuntime
from edge_client.settings import EdgeSettings
from edge_client.threads import in_thread
from split_llama.errors import UsageError
from split_llama.wire.control import Open

# A public text, said again and again until the prompt is as long as wanted.
PUBLIC_TEXT = (
    "Once upon a time there was a little girl who lived near the forest with her grandmother. Every morning she took a "
    "basket, walked along the river and looked for berries. One day she met an old man who had lost his dog. "
)


@dataclass(frozen=True, slots=True)
class BenchPlan:
    """What to run: an answer of `new_tokens` to a prompt of `prompt_tokens`, `repeats` times."""

    prompt_tokens: int = 64
    new_tokens: int = 128
    repeats: int = 3


@dataclass(frozen=True, slots=True)
class Mode:
    """The figures of one way to run, over all repeats. `parts` are seconds per token behind the first; `server_told`
    says whether the server's share is from its own metrics, or what was left. `typical_speed` is that of the median
    round: the mean is lower where something else disturbs some of them."""

    speculate: str
    parts: Parts
    server_told: bool
    tokens_per_second: tuple[float, ...]
    typical_speed: float
    first_token_seconds: float
    tokens: int
    round_trips: int
    drafted: int
    accepted: int
    rows_up: int
    bytes_up: int
    bytes_down: int

    @property
    def median_speed(self) -> float:
        """Tokens per second of the middle repeat."""
        return statistics.median(self.tokens_per_second)


@dataclass(frozen=True, slots=True)
class BenchResult:
    """All figures of one run. `modes` begins with the one that was asked for."""

    server: str
    partition: str
    codec: str
    noise_sigma: float
    link: LinkSpeed
    prompt_tokens: int
    modes: tuple[Mode, ...]


class Bench:
    """One run over a connected edge."""

    def __init__(self, settings: EdgeSettings, plan: BenchPlan, edge: EdgeRuntime) -> None:
        self._settings = settings
        self._plan = plan
        self._edge = edge
        self._ids = prompt_ids(edge, plan)
        self._pace: Pace | None = None

    async def run(self, notify: Notify) -> BenchResult:
        """Run all modes in turns, so that a machine whose speed drifts hurts them alike. Raises `FlLlamaError`."""
        settings, plan, edge = self._settings, self._plan, self._edge
        notify("measuring the link with random rows")
        link = await measure_link(settings, edge)
        modes = ["off"] if settings.speculate == "off" else [settings.speculate, "off"]
        answers: dict[str, list[Watched]] = {mode: [] for mode in modes}
        told: dict[str, list[float | None]] = {mode: [] for mode in modes}
        both = ", with guesses and without" if len(modes) > 1 else ""
        notify(f"{plan.repeats} times {len(self._ids)} + {plan.new_tokens} tokens{both}")
        await self.answer("off", plan.new_tokens)
        _, prompt = await self._clocked("off", 1)
        for _ in range(plan.repeats):
            for mode in modes:
                answer, clock = await self._clocked(mode, plan.new_tokens)
                answers[mode].append(answer)
                known = clock is not None and prompt is not None
                told[mode].append(clock.per_step(prompt, len(answer.rounds)) if known and clock and prompt else None)
        return BenchResult(
            server=settings.server_url(),
            partition=str(edge.source.partition),
            codec=settings.codec,
            noise_sigma=edge.noise.sigma,
            link=link,
            prompt_tokens=len(self._ids),
            modes=tuple(_mode(mode, answers[mode], told[mode], link) for mode in modes),
        )

    async def _clocked(self, mode: str, new_tokens: int) -> tuple[Watched, ServerClock | None]:
        """Make an answer, and ask the server what it took there."""
        before = await in_thread(lambda: ServerClock.read(self._settings))
        answer = await self.answer(mode, new_tokens)
        after = await in_thread(lambda: ServerClock.read(self._settings))
        return answer, after.since(before) if before is not None and after is not None else None

    async def answer(self, mode: str, new_tokens: int) -> Watched:
        """Make one answer, with guesses unless `mode` is off."""
        edge = self._edge
        params = edge.params(max_new_tokens=new_tokens, ignore_eos=True, **sampling(self._settings))
        async with edge.open() as session:
            if mode == "off":
                session.pace = None
            else:
                # What was learned about link and guesses goes on from answer to answer.
                session.pace = self._pace or session.pace
                self._pace = session.pace
            return await watch(session, self._ids, edge.turn(self._ids, params), lambda: edge.times)


def prompt_ids(edge: EdgeRuntime, plan: BenchPlan) -> list[int]:
    """Give the public prompt in just so many tokens. Raises `UsageError` when the context does not hold the answer."""
    if plan.prompt_tokens + plan.new_tokens > edge.max_length:
        raise UsageError(
            f"{plan.prompt_tokens} + {plan.new_tokens} tokens asked for, the context holds {edge.max_length}; take "
            "fewer with --prompt-tokens and --new-tokens"
        )
    ids = edge.tokenizer.encode(PUBLIC_TEXT)
    again = edge.tokenizer.encode(PUBLIC_TEXT, special_tokens=False) or ids
    while ids and len(ids) < plan.prompt_tokens:
        ids = ids + again
    return ids[: plan.prompt_tokens]


def sampling(settings: EdgeSettings) -> dict[str, Any]:
    """Give the user's sampling settings, as `EdgeRuntime.params` takes them."""
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
    return {name: getattr(settings, name) for name in names}


async def measure_link(settings: EdgeSettings, edge: EdgeRuntime) -> LinkSpeed:
    """Measure the way to the server over connections of their own."""
    source = edge.source
    blocks = (source.server_blocks.start, source.server_blocks.stop)
    opening = Open(session="0" * 32, secret="0" * 64, blocks=blocks, geometry=source.card.geometry)
    round_trip = await measure_round_trip(settings, opening)
    async with ServerLink(Connector.of(settings), reconnect_seconds=settings.reconnect_seconds) as link:
        return await Prober(link, opening).bandwidth(round_trip)


def _mode(name: str, answers: Sequence[Watched], told: Sequence[float | None], link: LinkSpeed) -> Mode:
    known = [seconds for seconds in told if seconds is not None]
    server = statistics.fmean(known) if len(known) == len(answers) else None
    bytes_up, bytes_down = sum(one.bytes_up for one in answers), sum(one.bytes_down for one in answers)
    wire = bytes_up / link.up + bytes_down / link.down
    rounds = [one for answer in answers for one in answer.rounds]
    tokens = sum(one.tokens for one in answers)
    return Mode(
        speculate=name,
        parts=mean_parts(answers, wire=wire, way=link.round_trip, server=server),
        server_told=server is not None,
        tokens_per_second=tuple(one.tokens / one.seconds for one in answers if one.rounds),
        typical_speed=tokens / len(rounds) / statistics.median(one.seconds for one in rounds),
        first_token_seconds=statistics.median(one.first_token for one in answers),
        tokens=tokens,
        round_trips=len(rounds),
        drafted=sum(one.drafted for one in rounds),
        accepted=sum(one.accepted for one in rounds),
        rows_up=sum(one.rows_up for one in answers),
        bytes_up=bytes_up,
        bytes_down=bytes_down,
    )
