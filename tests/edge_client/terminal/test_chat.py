"""The chat against a real server, its lines from a script."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from edge_client.runtime import prepare
from edge_client.settings import EdgeSettings
from edge_client.terminal.chat import Chat
from edge_client.terminal.connection import Connection
from edge_client.terminal.status import Totals, toolbar
from edge_client.tokenizer import EdgeTokenizer
from split_llama.demo import demo_model_path
from split_llama.errors import ServerUnreachable, UsageError
from tests.edge_client.conftest import MakeSettings, ServeModel

Step = str | Callable[[], Any]
LONG = "tell me something long about bada gun and all the rest of it"


class Script:
    """A screen whose user does one step after the other: a line, or something to happen meanwhile.

    `stop_after` presses Ctrl-C so many times once so many pieces of the next answer were shown.
    """

    def __init__(self, *steps: Step, interactive: bool = True) -> None:
        self.is_interactive = interactive
        self.steps = list(steps)
        self.answers: list[str] = [""]
        self.notices: list[str] = []
        self.stop_after: tuple[int, int] | None = None
        self.on_piece: Callable[[int], None] = lambda count: None
        self._pieces = 0
        self._press: Callable[[], None] = lambda: None

    async def read(self) -> str | None:
        while self.steps:
            step = self.steps.pop(0)
            if isinstance(step, str):
                self._pieces = 0
                return step
            result = step()
            if asyncio.iscoroutine(result):
                await result
        return None

    def write(self, text: str) -> None:
        self.answers[-1] += text
        self._pieces += 1
        self.on_piece(self._pieces)
        if self.stop_after is not None and self._pieces == self.stop_after[0]:
            for _ in range(self.stop_after[1]):
                self._press()
            self.stop_after = None

    def notice(self, text: str) -> None:
        self.notices.append(text)

    def end_answer(self) -> None:
        if self.answers[-1]:
            self.answers.append("")

    @contextlib.contextmanager
    def stopping(self, press: Callable[[], object]) -> Iterator[None]:
        self._press = press
        yield
        self._press = lambda: None

    def told(self, words: str) -> bool:
        return any(words in notice for notice in self.notices)


@contextlib.asynccontextmanager
async def chatting(settings: EdgeSettings, screen: Script, system: str | None = None) -> AsyncIterator[Chat]:
    source = await asyncio.to_thread(lambda: prepare(settings))
    connection = Connection(settings, source, screen.notice, lambda _present, _total: None)
    chat = Chat(connection, screen, Totals(), system)
    try:
        yield chat
    finally:
        await connection.drop()


async def run(settings: EdgeSettings, screen: Script, system: str | None = None) -> Chat:
    async with chatting(settings, screen, system) as chat:
        await chat.run()
    return chat


@pytest.fixture
async def url(tiny_checkpoint: Any, serve_model: ServeModel) -> AsyncIterator[str]:
    async with serve_model(tiny_checkpoint(max_positions=1024)) as url:
        yield url


@pytest.mark.parametrize("demo", [False, True])
async def test_a_turn_sends_only_its_new_tokens(
    demo: bool, tiny_checkpoint: Any, serve_model: ServeModel, edge_settings: MakeSettings
) -> None:
    folder = demo_model_path() if demo else tiny_checkpoint(max_positions=1024)
    async with serve_model(folder) as url:
        settings = edge_settings(url, max_new_tokens=24, speculate="off")
        screen = Script()
        async with chatting(settings, screen, "be brief") as chat:
            lasts, held = [], []
            for message in (LONG, "and then?", "why?", "is it true?"):
                screen.steps = [message]
                await chat.run()
                lasts.append(chat._totals.last)
                known = chat.conversation.known()[-1]
                held.append(len(known.ids))
    for before, last in zip(held, lasts[1:], strict=False):
        assert last is not None
        # What was fed is known but for the last token of an answer that did not end by itself.
        assert before - last.cached_tokens in (0, 1)
        assert last.rows_up == last.prompt_tokens - last.cached_tokens + last.round_trips - 1
    assert len(chat.conversation.exchanges) == 4


async def test_retokenising_would_not_do(url: str, edge_settings: MakeSettings) -> None:
    """With a tiny random model the answers are such that their text comes out as other tokens."""
    settings = edge_settings(url, max_new_tokens=20)
    screen = Script(LONG, "and?")
    async with chatting(settings, screen) as chat:
        await chat.run()
        first, second = chat.conversation.known()
        tokenizer = EdgeTokenizer.open(chat._connection.source.folder)
    anew = tokenizer.encode(second.rendering, special_tokens=False)
    assert second.ids[: len(first.ids)] == first.ids
    assert tuple(anew[: len(first.ids)]) != first.ids


async def test_stopping_keeps_the_answer_and_its_session(url: str, edge_settings: MakeSettings) -> None:
    screen = Script(lambda: setattr(screen, "stop_after", (5, 1)), LONG, "and now?")
    settings = edge_settings(url, max_new_tokens=400, speculate="off")
    async with chatting(settings, screen) as chat:
        original = chat._ask_once

        async def short(ids: list[int], made: Any) -> None:
            if chat.conversation.exchanges:
                chat._connection.settings = edge_settings(url, max_new_tokens=3, speculate="off")
            await original(ids, made)

        chat._ask_once = short  # type: ignore[method-assign]
        await chat.run()
        first, second = chat.conversation.exchanges
        last = chat._totals.last
    assert first.stopped
    assert not second.stopped
    assert first.known is not None
    assert 0 < len(first.answer) < 1000
    assert screen.told("stopped; what came is kept")
    assert last is not None
    # Its session went on living: nothing but the last token and the new message was sent.
    assert len(first.known.ids) - last.cached_tokens in (0, 1)


async def test_stopping_before_anything_came_takes_the_message_back(url: str, edge_settings: MakeSettings) -> None:
    screen = Script(LONG)
    async with chatting(edge_settings(url), screen) as chat:
        original = chat._ask_once

        async def ask(ids: list[int], made: Any) -> None:
            screen._press()
            await asyncio.sleep(0)
            await original(ids, made)

        chat._ask_once = ask  # type: ignore[method-assign]
        await chat.run()
    assert chat.conversation.exchanges == []
    assert screen.told("the message is taken back")


async def test_pressing_twice_ends_at_once_and_the_chat_goes_on(url: str, edge_settings: MakeSettings) -> None:
    screen = Script(lambda: setattr(screen, "stop_after", (4, 2)), LONG, "and?")
    chat = await run(edge_settings(url, max_new_tokens=30), screen)
    first, second = chat.conversation.exchanges
    assert first.stopped
    assert first.answer
    assert second.answer
    sessions = await asyncio.to_thread(httpx.get, f"{url}/v1/sessions")
    assert sessions.json()["data"] == []


async def test_retry_undo_new_and_system(url: str, edge_settings: MakeSettings) -> None:
    screen = Script(LONG, "/retry", "second", "/undo", "/system be kind", "/system", "third", "/system none", "/new")
    async with chatting(edge_settings(url, max_new_tokens=8), screen) as chat:
        await chat.run()
        assert chat.conversation.exchanges == []
        assert chat.conversation.system is None
        first, again, second, third = screen.answers[:4]
        assert first == again
        assert first
        assert second
        assert third
        assert screen.told("taken back: second")
        assert screen.told("system message: be kind")
        assert screen.told("computed anew behind it")
        assert len(chat._connection.current.conversations) == 0  # type: ignore[union-attr]
        screen.steps = ["/undo"]
        await chat.run()
    assert screen.told("the conversation is empty")


async def test_partition_and_noise_say_that_it_is_a_second_release(url: str, edge_settings: MakeSettings) -> None:
    screen = Script("/partition 2,1", LONG, "/noise 0.05", "and?", "/partition 1, 2", "so?", "/stats")
    async with chatting(edge_settings(url, max_new_tokens=6, noise="0.02"), screen) as chat:
        await chat.run()
        releases = [notice for notice in screen.notices if "second release" in notice]
        assert len(releases) == 2
        last = chat._totals.last
        assert last is not None
        assert last.cached_tokens == 0
        assert chat._connection.source.partition.p == 1
        assert toolbar(chat._connection.settings, "tiny", chat._totals).startswith(" tiny · partition 1,2 · noise 0.05")
        assert chat._connection.rows_released > last.rows_up
    assert screen.told("distinct noised rows released")


async def test_settings_that_cannot_be_used_change_nothing(url: str, edge_settings: MakeSettings) -> None:
    steps = [
        "/partition 9,9",
        "/partition 0,1",
        "/partition one",
        "/noise loud",
        "/speculate 99",
        "/noise 0",
        "/nise 1",
    ]
    screen = Script(LONG, *steps, "and?")
    async with chatting(edge_settings(url, max_new_tokens=5), screen) as chat:
        await chat.run()
        last = chat._totals.last
        assert chat._connection.settings.partition == "1,1"
    assert last is not None
    assert last.cached_tokens > 0
    for words in (
        "9,9",
        "allow-embedding-states",
        "'one'",
        "'loud'",
        "'99'",
        "noise is 0 already",
        "did you mean /noise",
    ):
        assert screen.told(words), words


@pytest.mark.parametrize("command", ["/noise no_such_module:Noise", "/partition 1,0"])
async def test_an_edge_that_cannot_be_made_leaves_the_old_settings(
    command: str, tiny_checkpoint: Any, serve_model: ServeModel, edge_settings: MakeSettings
) -> None:
    screen = Script(LONG, command, "and?")
    async with serve_model(tiny_checkpoint(max_positions=1024), allowed_partitions="1,1") as url:
        settings = edge_settings(url, max_new_tokens=5, noise="0.02")
        async with chatting(settings, screen) as chat:
            source = chat._connection.source
            await chat.run()
            assert chat._connection.settings == settings
            assert chat._connection.source is source
    assert screen.told("there is no module 'no_such_module'" if "noise" in command else "which hosts [1, 3)")
    assert len(chat.conversation.exchanges) == 2


async def test_interrupting_the_wait_for_another_edge_leaves_the_old_settings(
    url: str, edge_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = Script(LONG, "/speculate 4", "and?")
    settings = edge_settings(url, max_new_tokens=5, speculate="off")
    async with chatting(settings, screen) as chat:
        connect = chat._connection._connect

        async def interrupted() -> Any:
            if chat._connection.settings.speculate == "4":
                screen._press()
            await asyncio.sleep(0)
            return await connect()

        monkeypatch.setattr(chat._connection, "_connect", interrupted)
        await chat.run()
        assert chat._connection.settings == settings
    assert screen.told("stopped")
    assert len(chat.conversation.exchanges) == 2


async def test_rows_sent_again_with_the_same_noise_are_counted_once(url: str, edge_settings: MakeSettings) -> None:
    counts: list[int] = []
    screen = Script()
    async with chatting(edge_settings(url, max_new_tokens=5, noise="0.02", speculate="off"), screen) as chat:
        note = lambda: counts.append(chat._connection.rows_released)  # noqa: E731
        screen.steps = [
            LONG,
            note,
            "/speculate 1",
            note,
            "/speculate off",
            "/retry",
            note,
            "/noise 0.03",
            "/retry",
            note,
        ]
        await chat.run()
        assert chat._connection.current is not None
        assert chat._connection.current.rows_released == counts[-1]
    first, kept, again, other = counts
    assert 0 < first == kept == again
    assert other == 2 * first


async def test_a_long_command_is_stopped_and_the_chat_goes_on(url: str, edge_settings: MakeSettings) -> None:
    screen = Script(LONG, "/partition 2,1", "and?")
    async with chatting(edge_settings(url, max_new_tokens=5), screen) as chat:

        async def change(_changes: object) -> None:
            screen._press()
            await asyncio.sleep(60)

        chat._connection.change = change  # type: ignore[method-assign]
        await chat.run()
    assert screen.told("stopped")
    assert len(chat.conversation.exchanges) == 2


async def test_speculation_may_change_and_the_text_stays(url: str, edge_settings: MakeSettings) -> None:
    screen = Script(LONG, "/speculate 4", "/retry", "/speculate off", "/retry", "/stats")
    await run(edge_settings(url, max_new_tokens=40, speculate="auto", drafter="lookup"), screen)
    assert screen.answers[0]
    assert screen.answers[:1] * 3 == screen.answers[:3]


async def test_saved_and_loaded(url: str, edge_settings: MakeSettings, tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    screen = Script(LONG, f"/save {path}", "/new", f"/load {path}", "and?", f"/load {tmp_path}/none")
    chat = await run(edge_settings(url, max_new_tokens=6), screen, "be brief")
    assert len(chat.conversation.exchanges) == 2
    assert chat.conversation.exchanges[0].message == LONG
    assert screen.told("as it is, readable by you alone")
    assert screen.told("loaded 1")
    assert screen.told("cannot read")


async def test_a_full_context_is_told(
    tiny_checkpoint: Any, serve_model: ServeModel, edge_settings: MakeSettings
) -> None:
    async with serve_model(tiny_checkpoint(max_positions=128)) as url:
        screen = Script(LONG, "and?", "x " * 200)
        await run(edge_settings(url, max_new_tokens=300), screen)
    assert screen.told("the context is full")
    assert screen.told("/undo makes room")


async def test_piped_mistakes_end_the_chat(url: str, edge_settings: MakeSettings) -> None:
    with pytest.raises(UsageError, match="no command"):
        await run(edge_settings(url), Script("/xyz", interactive=False))
    chat = await run(
        edge_settings(url, max_new_tokens=3), Script("", "  \n", LONG, "/quit", "never", interactive=False)
    )
    assert len(chat.conversation.exchanges) == 1


async def test_a_server_killed_in_mid_answer_is_waited_for(
    tiny_checkpoint: Any, server_process: Any, edge_settings: MakeSettings
) -> None:
    server = server_process(tiny_checkpoint(max_positions=1024), "--allowed-partitions", "0,0", "--threads", "1")
    await asyncio.to_thread(server.start)
    screen = Script(LONG)
    restarting: list[asyncio.Task[None]] = []

    async def restart() -> None:
        await asyncio.sleep(1.5)
        await asyncio.to_thread(server.start)

    def kill(count: int) -> None:
        if count == 5:
            server.kill()
            restarting.append(asyncio.get_running_loop().create_task(restart()))

    chat = await run(edge_settings(server.url, max_new_tokens=60), screen)
    undisturbed = chat.conversation.exchanges[0].answer
    screen.steps, screen.on_piece = [LONG], kill
    chat = await run(edge_settings(server.url, max_new_tokens=60), screen)
    assert restarting
    assert chat.conversation.exchanges[0].answer == undisturbed
    assert screen.told("waiting for it to come back")
    assert screen.told("the server is back")


async def test_a_server_that_stays_away_is_told_and_a_later_message_connects_again(
    tiny_checkpoint: Any, server_process: Any, edge_settings: MakeSettings
) -> None:
    server = server_process(tiny_checkpoint(max_positions=1024), "--allowed-partitions", "0,0", "--threads", "1")
    await asyncio.to_thread(server.start)
    screen = Script(LONG, server.kill, "are you there?", server.start, "and now?")
    chat = await run(edge_settings(server.url, max_new_tokens=6, reconnect_seconds=1), screen)
    assert [exchange.message for exchange in chat.conversation.exchanges] == [LONG, "and now?"]
    assert screen.told("the server was lost")
    screen = Script(LONG, server.kill, "are you there?", interactive=False)
    with pytest.raises(ServerUnreachable):
        await run(edge_settings(server.url, max_new_tokens=6, reconnect_seconds=1), screen)
