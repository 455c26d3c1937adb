"""What the chat is about: the messages, and with each answer the ids it was generated with. No model, no files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from edge_client.transcript import Known
from split_llama.errors import UsageError

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Exchange:
    """One message and its answer; `known` is lost when the conversation was read from a file."""

    message: str
    answer: str
    stopped: bool = False
    known: Known | None = None


@dataclass(slots=True)
class Conversation:
    """A system message and the exchanges so far."""

    system: str | None = None
    exchanges: list[Exchange] = field(default_factory=list)

    def messages(self, coming: str | None = None) -> list[Message]:
        """Give the messages as chat templates take them, `coming` as the last one."""
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        for exchange in self.exchanges:
            messages.append({"role": "user", "content": exchange.message})
            messages.append({"role": "assistant", "content": exchange.answer})
        if coming is not None:
            messages.append({"role": "user", "content": coming})
        return messages

    def known(self) -> list[Known]:
        """Give what is known of the answers' ids, in order."""
        return [exchange.known for exchange in self.exchanges if exchange.known is not None]

    def take_back(self) -> Exchange:
        """Remove the last exchange. Raises `UsageError` when there is none."""
        if not self.exchanges:
            raise UsageError("there is no message to take back: the conversation is empty")
        return self.exchanges.pop()


def from_messages(messages: Sequence[Message], stopped: Sequence[bool]) -> Conversation:
    """Read messages as `Conversation.messages` gives them. Raises `UsageError` for any other order."""
    rest = list(messages)
    system = rest.pop(0)["content"] if rest and rest[0]["role"] == "system" else None
    roles = [message["role"] for message in rest]
    if roles != ["user", "assistant"] * (len(roles) // 2) or len(stopped) != len(roles) // 2:
        raise UsageError("expected messages of user and assistant in turns, the last one an answer")
    pairs = zip(rest[::2], rest[1::2], stopped, strict=True)
    exchanges = [Exchange(asked["content"], answered["content"], cut) for asked, answered, cut in pairs]
    return Conversation(system, exchanges)
