"""Examples to samples of token ids with the loss on answers only, by the tokenizer and chat template of the edge."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from edge_client.chat_template import ChatTemplate, load_template
from edge_client.tokenizer import EdgeTokenizer
from split_llama.errors import UsageError
from split_llama.generation_config import GenerationDefaults
from split_llama.json_file import read_json
from training.tasks.examples import IGNORED, AnyExample, Dialogue, Example, Message, Passage, Sample

# The edge renders prompts; what is learned is a finished turn, without the header of the next one. The empty
# expression keeps a line break with which the template itself may begin.
_NO_HEADER = "{% set add_generation_prompt = false %}{{ '' }}"


@dataclass(frozen=True, slots=True)
class Encoded:
    """The samples of a data set; `shortened` prompts lost their beginning, `left_out` examples were too long."""

    samples: list[Sample]
    shortened: int
    left_out: int


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """A model's chat template, rendered with the header of the answer (a prompt) or without it (a finished turn)."""

    prompt: ChatTemplate
    finished: ChatTemplate
    special_tokens: dict[str, str]

    @classmethod
    def open(cls, folder: Path, special_tokens: dict[str, str]) -> ChatFormat:
        """Read the template of a model folder. Raises `UsageError` when it has none."""
        source = load_template(folder)
        return cls(ChatTemplate.compile(source), ChatTemplate.compile(_NO_HEADER + source), special_tokens)

    def render(self, messages: Sequence[Message], *, header: bool) -> str:
        """The text of `messages`, with the header of the assistant's next turn or without."""
        template = self.prompt if header else self.finished
        turns = [{"role": message.role, "content": message.content} for message in messages]
        return template.render(turns, self.special_tokens)


@dataclass(frozen=True, slots=True)
class Encoder:
    """Encodes for one model. `max_length` is in tokens, BOS and EOS counted; `chat` is None without a template."""

    tokenizer: EdgeTokenizer
    end_ids: tuple[int, ...]
    max_length: int
    chat: ChatFormat | None

    def __post_init__(self) -> None:
        if not self.end_ids:
            raise UsageError("this model names no EOS token, so an answer could not be ended")
        if self.max_length < 3:
            raise UsageError(f"max_length must be at least 3 (BOS, one token, EOS), found {self.max_length}")

    @classmethod
    def open(cls, folder: Path, max_length: int) -> Encoder:
        """Read the tokenizer, the ids that end an answer and, if there is one, the chat template of a model folder."""
        tokenizer = EdgeTokenizer.open(folder)
        try:
            chat = ChatFormat.open(folder, tokenizer.special_tokens)
        except UsageError:
            chat = None
        return cls(tokenizer, _end_ids(folder, tokenizer), max_length, chat)

    def encode(self, examples: Iterable[AnyExample]) -> Encoded:
        """Encode all. An answer that does not fit is left out and counted; raises `UsageError` if nothing fits."""
        samples: list[Sample] = []
        shortened = left_out = 0
        for example in examples:
            made, cut = self._encode(example)
            samples += made
            shortened += cut
            left_out += not made
        if not samples:
            raise UsageError(
                f"none of the {left_out} examples fits: an answer, BOS and one token of its prompt must fit in "
                f"max_length = {self.max_length}"
            )
        return Encoded(samples, shortened, left_out)

    def samples(self, example: AnyExample) -> list[Sample]:
        """The samples of one example: none when its answer is too long, several for a long passage, else one."""
        return self._encode(example)[0]

    def prompt(self, example: Example | Dialogue, room: int) -> list[int]:
        """The ids a model continues to answer, shortened from the left as for training to leave `room` for the answer.

        Raises `UsageError` when nothing of the prompt would be left.
        """
        keep = self.max_length - room
        if keep < 2:
            raise UsageError(f"an answer of {room} tokens leaves no room for a prompt in {self.max_length}")
        return _shorten(self._prompt_ids(example), keep, self._bos())

    def _encode(self, example: AnyExample) -> tuple[list[Sample], bool]:
        if isinstance(example, Passage):
            return self._windows(example.text), False
        ids, labels = self._dialogue(example) if isinstance(example, Dialogue) else self._answer(example)
        if len(ids) <= self.max_length:
            return [Sample(tuple(ids), tuple(labels))], False
        kept = self._cut(ids, labels)
        return ([kept], True) if kept else ([], False)

    def _cut(self, ids: list[int], labels: list[int]) -> Sample | None:
        """The sample without its beginning; None unless the last answer stays whole, behind a token of its prompt."""
        bos = self._bos()
        last = len(labels) - next((n for n, label in enumerate(reversed(labels)) if label == IGNORED), len(labels))
        if len(ids) - last + len(bos) + 1 > self.max_length:
            return None
        labels = labels[-self.max_length :]
        # What is left of an earlier answer lacks its question.
        broken = next(n for n, label in enumerate(labels[len(bos) :], start=len(bos)) if label == IGNORED)
        labels = [IGNORED] * broken + labels[broken:]
        return Sample(tuple(_shorten(ids, self.max_length, bos)), tuple(labels))

    def _answer(self, example: Example) -> tuple[list[int], list[int]]:
        prompt = self.tokenizer.encode(example.prompt)
        ids = [*self.tokenizer.encode(example.prompt + example.answer), self.end_ids[0]]
        # Where the tokenizer joins the prompt's end with the answer's beginning, the joint token is learned too.
        begin = _common(prompt, ids)
        return ids, [IGNORED] * begin + ids[begin:]

    def _dialogue(self, dialogue: Dialogue) -> tuple[list[int], list[int]]:
        chat = self._chat()
        messages = dialogue.messages
        whole = chat.render(messages, header=False)
        ids = self.tokenizer.encode(whole, special_tokens=False)
        labels = [IGNORED] * len(ids)
        end = len(ids)
        for number, message in enumerate(messages):
            if message.role != "assistant":
                continue
            before = chat.render(messages[:number], header=True)
            behind = chat.render(messages[: number + 1], header=False)
            if not (whole.startswith(behind) and behind.startswith(before)):
                raise UsageError(
                    "this model's chat template renders an earlier turn otherwise once more turns follow; "
                    "give dialogues with one answer each"
                )
            begin, end = (_common(self.tokenizer.encode(text, special_tokens=False), ids) for text in (before, behind))
            end = self._behind_end_token(ids, begin, end)
            labels[begin:end] = ids[begin:end]
        # What the template writes behind the last answer changes nothing that is learned.
        ids, labels = ids[:end], labels[:end]
        closing = [] if ids[-1] in self.end_ids else [self.end_ids[0]]
        return ids + closing, labels + closing

    def _behind_end_token(self, ids: Sequence[int], begin: int, end: int) -> int:
        """Where an answer ends: behind its last end token, as generation stops there; else at `end`."""
        stops = [position for position in range(begin, end) if ids[position] in self.end_ids]
        return stops[-1] + 1 if stops else end

    def _windows(self, text: str) -> list[Sample]:
        bos = self._bos()
        ids = self.tokenizer.encode(text, special_tokens=False)
        width = self.max_length - len(bos)
        windows = [ids[start : start + width] for start in range(0, len(ids), width)]
        samples = [Sample((*bos, *window), (*(IGNORED for _ in bos), *window)) for window in windows]
        return [sample for sample in samples if sample.targets]

    def _prompt_ids(self, example: Example | Dialogue) -> list[int]:
        if isinstance(example, Example):
            return self.tokenizer.encode(example.prompt)
        return self.tokenizer.encode(self._chat().render(example.messages[:-1], header=True), special_tokens=False)

    def _chat(self) -> ChatFormat:
        if self.chat is None:
            raise UsageError("this model has no chat template; give it prompts and responses instead of messages")
        return self.chat

    def _bos(self) -> list[int]:
        """What the model wants in front of every text: BOS, or nothing."""
        return self.tokenizer.encode("")


def _end_ids(folder: Path, tokenizer: EdgeTokenizer) -> tuple[int, ...]:
    """EOS first, then the other ids that end an answer."""
    generation, config = (
        read_json(folder / name) if (folder / name).is_file() else {}
        for name in ("generation_config.json", "config.json")
    )
    eos = tokenizer.special_tokens.get("eos_token")
    named = None if eos is None else tokenizer.token_id(eos)
    stop = GenerationDefaults.from_hf(generation, config).eos_token_ids
    return tuple(dict.fromkeys([*(() if named is None else (named,)), *stop]))


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """How many items both begin with."""
    shortest = min(len(left), len(right))
    return next((n for n in range(shortest) if left[n] != right[n]), shortest)


def _shorten(items: list[int], length: int, first: list[int]) -> list[int]:
    """The last `length` items; `first` stays in front when the items begin with it, as BOS does."""
    if len(items) <= length:
        return items
    if items[: len(first)] != first:
        return items[-length:]
    return [*first, *items[len(first) - length :]]
