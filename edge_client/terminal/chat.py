"""The chat's loop: read a line, do what it says, until there is none."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence

from edge_client.answer import describe_noise
from edge_client.deadline import deadline
from edge_client.runtime import EdgeRuntime
from edge_client.terminal import saved
from edge_client.terminal.answering import Made, Stopper, make_answer
from edge_client.terminal.commands import help_text, read_line
from edge_client.terminal.connection import Connection
from edge_client.terminal.conversation import Conversation, Exchange
from edge_client.terminal.screens import Screen
from edge_client.terminal.status import Totals, report
from edge_client.threads import in_thread
from edge_client.transcript import known_answer, next_ids
from edge_client.usual_params import usual_params
from split_llama.errors import (
    ConnectionRefused,
    ContextExceeded,
    DeadlineExceeded,
    FlLlamaError,
    RemoteError,
    UsageError,
)

SECOND_RELEASE = (
    "the conversation so far goes to the server once more with the next message, under other noise: a second release "
    "of the same rows, from which more can be told than from one (docs/privacy.md). /new avoids it"
)


class Chat:
    """One chat. `run` ends when its screen has nothing more to read, or at /quit."""

    def __init__(self, connection: Connection, screen: Screen, totals: Totals, system: str | None = None) -> None:
        self._connection = connection
        self._screen = screen
        self._totals = totals
        self.conversation = Conversation(system)
        self._commands: dict[str, Callable[[str], Coroutine[None, None, None]]] = {
            "help": self._help,
            "new": self._new,
            "system": self._system,
            "partition": self._partition,
            "noise": self._noise,
            "speculate": self._speculate,
            "stats": self._stats,
            "save": self._save,
            "load": self._load,
            "retry": self._retry,
            "undo": self._undo,
        }

    async def run(self) -> None:
        """Chat. Raises `FlLlamaError` for whatever goes wrong when nobody sits there to mend it."""
        while (text := await self._screen.read()) is not None:
            try:
                line = read_line(text)
                if isinstance(line, str):
                    if line.strip():
                        await self._send(line)
                elif line.name == "quit":
                    return
                else:
                    await self._do(self._commands[line.name](line.argument))
            except FlLlamaError as error:
                if not self._screen.is_interactive:
                    raise
                self._screen.notice(error.message + _advice(error))

    async def _do(self, command: Coroutine[None, None, None]) -> None:
        """Do a command; Ctrl-C ends a long one (fetching weights, waiting for the server) and not the chat."""
        task = asyncio.create_task(command, name="command")
        with self._screen.stopping(task.cancel):
            try:
                await task
            except asyncio.CancelledError:
                own = asyncio.current_task()
                if own is not None and own.cancelling():
                    raise
                self._screen.notice("stopped")

    async def _send(self, message: str) -> None:
        """Ask for an answer to `message`, and keep both."""
        made = Made()
        messages = self.conversation.messages(message)
        edge = await self._connection.edge()
        special = edge.tokenizer.special_tokens

        def tokenise() -> tuple[str, list[int]]:
            rendering = self._connection.template.render(messages, special)
            encode = lambda text: edge.tokenizer.encode(text, special_tokens=False)  # noqa: E731
            return rendering, next_ids(rendering, self.conversation.known(), encode)

        rendering, ids = await in_thread(tokenise)
        try:
            await self._answer(ids, made)
        finally:
            self._screen.end_answer()
            if made.stats is not None:
                self._totals.add(made.stats, len(made.tokens))
            if made.tokens:
                self._keep(message, rendering, ids, made, edge)
        self._tell_end(made)

    async def _answer(self, ids: list[int], made: Made) -> None:
        """Make the answer as a task of its own, so that it can be stopped without ending the chat."""
        task = asyncio.create_task(self._ask(ids, made), name="answer")
        stopper = Stopper(made, task)
        with self._screen.stopping(stopper.press):
            try:
                await task
            except asyncio.CancelledError:
                if not made.switch.is_on:
                    raise
            finally:
                stopper.release()

    async def _ask(self, ids: list[int], made: Made) -> None:
        was_open = self._connection.is_open
        try:
            await self._ask_once(ids, made)
        except DeadlineExceeded:
            raise
        except (RemoteError, ConnectionRefused):
            # Its link is over: the next message begins with another one.
            await self._connection.drop()
            if made.tokens or not was_open:
                raise
            self._screen.notice("the server was lost; connecting again")
            await self._ask_once(ids, made)

    async def _ask_once(self, ids: list[int], made: Made) -> None:
        edge = await self._connection.edge()
        params = usual_params(edge, self._connection.settings)
        async with deadline(self._connection.settings.request_timeout):
            await make_answer(edge, ids, params, made, show=self._screen.write, notify=self._screen.notice)

    def _keep(self, message: str, rendering: str, ids: list[int], made: Made, edge: EdgeRuntime) -> None:
        def show(tokens: Sequence[int]) -> str:
            stream = edge.tokenizer.stream(ids)
            return "".join(map(stream.push, tokens)) + stream.flush()

        ends = edge.defaults.eos_token_ids
        known = known_answer(rendering, ids, made.text, made.tokens, end_ids=ends, show=show)
        stopped = made.finish_reason is None or made.switch.is_on
        self.conversation.exchanges.append(Exchange(message, made.text, stopped, known))

    def _tell_end(self, made: Made) -> None:
        if made.switch.is_on:
            self._screen.notice(
                "stopped; what came is kept" if made.tokens else "stopped; the message is taken back: nothing had come"
            )
        elif made.finish_reason == "length":
            limit = self._connection.settings.max_new_tokens
            if len(made.tokens) >= limit:
                self._screen.notice(f"cut at {limit} tokens; --max-new-tokens allows more")
            else:
                self._screen.notice("cut: the context is full. /new begins another conversation, /undo makes room")

    async def _help(self, _: str) -> None:
        self._screen.notice(help_text())

    async def _new(self, _: str) -> None:
        self.conversation = Conversation(self.conversation.system)
        await self._forget_sessions()
        self._screen.notice("a new conversation")

    async def _system(self, text: str) -> None:
        if not text:
            self._screen.notice(f"system message: {self.conversation.system or 'none'}")
            return
        self.conversation.system = None if text == "none" else text
        again = "; the conversation so far is computed anew behind it" if self.conversation.exchanges else ""
        self._screen.notice(f"system message {'removed' if text == 'none' else 'set'}{again}")

    async def _partition(self, text: str) -> None:
        await self._change("partition", "".join(text.split()))
        self._screen.notice(f"partition {self._connection.settings.partition}")
        self._warn_of_release()

    async def _noise(self, text: str) -> None:
        await self._change("noise", text)
        edge = await self._connection.edge()
        self._screen.notice(describe_noise(self._connection.settings, edge.noise))
        self._warn_of_release()

    async def _speculate(self, text: str) -> None:
        await self._change("speculate", text)
        self._screen.notice(f"speculate {self._connection.settings.speculate}")

    async def _change(self, name: str, value: str) -> None:
        if getattr(self._connection.settings, name) == value:
            raise UsageError(f"{name} is {value} already")
        await self._connection.change({name: value})

    def _warn_of_release(self) -> None:
        if self.conversation.exchanges:
            self._screen.notice(SECOND_RELEASE)

    async def _stats(self, _: str) -> None:
        self._screen.notice(report(self._totals, self._connection.rows_released))

    async def _save(self, name: str) -> None:
        path = saved.save(self.conversation, name, self._connection.source.card.id)
        self._screen.notice(f"saved: {path} now holds the conversation's text as it is, readable by you alone")

    async def _load(self, name: str) -> None:
        self.conversation = saved.load(name)
        await self._forget_sessions()
        self._screen.notice(f"loaded {len(self.conversation.exchanges)} messages with their answers from {name}")

    async def _retry(self, _: str) -> None:
        before = self.conversation.take_back()
        try:
            await self._send(before.message)
        finally:
            # Stopped before a token came, or failed: the old answer is better than none.
            if not self.conversation.exchanges or self.conversation.exchanges[-1].message is not before.message:
                self.conversation.exchanges.append(before)

    async def _undo(self, _: str) -> None:
        message = self.conversation.take_back().message
        self._screen.notice(f"taken back: {' '.join(message.split())[:60]}")

    async def _forget_sessions(self) -> None:
        if self._connection.current is not None:
            await self._connection.current.conversations.clear()


def _advice(error: FlLlamaError) -> str:
    return "; /new begins another conversation, /undo makes room" if isinstance(error, ContextExceeded) else ""
